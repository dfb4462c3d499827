"""Attention per document, against one masked softmax per document in float64."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eulerforge.errors import RunError
from eulerforge.training import attention, document_blocks, document_products
from eulerforge.training.attention import documents_attention, kernel_for, no_mask

from .documents import reference, segments

LENGTHS = (5, 1, 9, 3)
AFTER = (None, 0, 0, None)
MODULE = torch.nn.Identity()


def states(heads: int, key_heads: int, width: int = 4, tokens: int = sum(LENGTHS), dtype: Any = torch.float64) -> Any:
    """query, key, value as transformers gives them: (1, heads, tokens, width), views of (1, tokens, heads, width)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, count, width) for count in (heads, key_heads, key_heads)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


@pytest.mark.parametrize(("block", "kept_share"), [(2, 0), (2, 0.4), (256, 2)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("after", [(), AFTER])
def test_output_and_gradients_are_the_references(
    after: tuple[int | None, ...],
    heads: tuple[int, int],
    window: int | None,
    block: int,
    kept_share: float,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(document_blocks, "BLOCK", block)
    monkeypatch.setattr(document_blocks, "KEPT_SHARE", kept_share)
    ours, expected = states(*heads), states(*heads)
    out, weights = documents_attention(
        MODULE,
        *ours,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        segments=segments(LENGTHS, after=after),
    )
    wanted = reference(*expected, LENGTHS, 0.3, window, softcap, after)
    assert weights is None
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for found, true in zip(
        torch.autograd.grad(out, ours, upstream), torch.autograd.grad(wanted, expected, upstream), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


def test_short_documents_keep_their_probabilities_and_long_ones_do_not() -> None:
    heads, key_heads, width = 9, 3, 64
    short, long = 100, 2000
    # blocks of 96 and 4 tokens, which see 96 and 100 keys
    of_short = heads * (96 * 96 + 4 * 100)
    assert document_blocks.kept_numbers({(short, 0): 2, (long, 0): 1}, heads, key_heads, width, None) == 2 * of_short
    most = document_blocks.KEPT_SHARE * (heads + 2 * key_heads) * width
    assert of_short <= most * short
    # the same document after ten tokens of another one sees ten keys more
    assert (
        document_blocks.kept_numbers({(short, 10): 1}, heads, key_heads, width, None) == of_short + heads * 10 * short
    )
    q, k, v = (torch.zeros(2 * short + long, count, width, requires_grad=True) for count in (heads, 3, 3))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        document_products.document_products(q, k, v, (short, long, short), 1.0)
    assert sum(saved) == 2 * of_short + q.numel() + k.numel() + v.numel()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_blocks, "BLOCK", 2)
    borders = segments((3, 1, 4))

    def run(query: Any, key: Any, value: Any) -> torch.Tensor:
        return documents_attention(
            MODULE, query, key, value, None, sliding_window=3, softcap=softcap, segments=borders
        )[0]

    assert torch.autograd.gradcheck(run, states(4, 2, width=2, tokens=8))


@pytest.mark.parametrize("window", [None, 3])
def test_the_padded_kernel_computes_the_same(window: int | None) -> None:
    ours, expected = states(6, 2), states(6, 2)
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in ours]
    out = attention._padded(*flat, attention._Call(segments(LENGTHS), 0.3, window, None, 0.0))
    wanted = reference(*expected, LENGTHS, 0.3, window, None)[0]
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for found, true in zip(
        torch.autograd.grad(out.square().sum(), ours), torch.autograd.grad(wanted.square().sum(), expected), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


def test_several_lines_are_one_flat_batch() -> None:
    flat = states(4, 2)
    lines = [tensor.transpose(1, 2).reshape(2, 9, -1, 4).transpose(1, 2) for tensor in flat]
    lengths = (5, 1, 3, 6, 3)
    out, _ = documents_attention(MODULE, *lines, None, scaling=1.0, segments=segments(lengths, lines=2))
    assert out.shape == (2, 9, 4, 4)
    wanted = reference(*flat, lengths, 1.0, None, None)
    torch.testing.assert_close(out.flatten(0, 1), wanted[0], rtol=1e-12, atol=1e-12)


def test_bf16_is_as_near_to_the_truth_as_sdpa() -> None:
    lengths = (70, 300, 40)
    sizes = {"tokens": sum(lengths), "width": 32}
    true = states(4, 2, **sizes)
    truth = reference(*true, lengths, 32**-0.5, None, None)
    upstream = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(truth, true, upstream)

    def errors(run: Any) -> list[float]:
        ours = states(4, 2, dtype=torch.bfloat16, **sizes)
        out = run(*ours)
        found = (out, *torch.autograd.grad(out, ours, upstream.bfloat16()))
        return [
            float(((a.double() - b).norm() / b.norm()).detach())
            for a, b in zip(found, (truth, *gradients), strict=True)
        ]

    def loop(query: Any, key: Any, value: Any) -> torch.Tensor:
        parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
        done = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(done, 2).transpose(1, 2)

    ours = errors(lambda *qkv: documents_attention(MODULE, *qkv, None, segments=segments(lengths))[0])
    for mine, theirs in zip(ours, errors(loop), strict=True):
        assert mine < 1.5 * theirs + 1e-3


@pytest.mark.parametrize("keys", [96, 120, 121])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_are_rounded_once(keys: int, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 6, keys, generator=torch.Generator().manual_seed(0)).mul_(4).to(dtype)
    exact = torch.softmax(scores.double(), -1)
    half_a_unit = torch.finfo(dtype).eps * (0.501 if dtype != torch.float32 else 8)
    room = torch.full_like(scores, torch.nan)
    for found in (document_products._softmax(scores, None), document_products._softmax(scores, room)):
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= half_a_unit * exact + 6e-8).all()
    assert not room.isnan().any()


def test_without_segments_it_is_sdpa() -> None:
    query, key, value = states(4, 4)
    out, _ = documents_attention(MODULE, query, key, value, None, scaling=0.5)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5).transpose(1, 2)
    assert torch.equal(out, wanted)


def test_a_packed_call_whose_borders_were_lost_is_refused() -> None:
    with pytest.raises(RunError, match="was not told where the documents"):
        documents_attention(MODULE, *states(4, 4), no_mask("cpu"))


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_would_change_the_scores_is_refused(name: str) -> None:
    with pytest.raises(RunError, match=f"attention with {name} is not computed"):
        documents_attention(MODULE, *states(4, 4), None, segments=segments(LENGTHS), **{name: torch.zeros(4)})


def test_a_kernel_that_knows_no_shared_prefix_is_refused() -> None:
    """A module may drop out where the config, which the layout follows, does not say so."""
    with pytest.raises(RunError, match="a prefix that rows share is not computed") as caught:
        documents_attention(MODULE, *states(4, 4), None, dropout=0.1, segments=segments(LENGTHS, after=AFTER))
    assert caught.value.problems[0].key == "data.share_prefixes"


def test_values_of_another_width_are_refused() -> None:
    query, key, value = states(4, 4)
    with pytest.raises(RunError, match="values are 2 wide and queries 4"):
        documents_attention(MODULE, query, key, value[..., :2], None, segments=segments(LENGTHS))


def test_attention_dropout_draws_and_stays_within_the_document() -> None:
    query, key, value = states(4, 2)
    torch.manual_seed(0)
    out, _ = documents_attention(MODULE, query, key, value, None, dropout=0.5, segments=segments(LENGTHS))
    whole, _ = documents_attention(MODULE, query, key, value, None, segments=segments(LENGTHS))
    assert not torch.allclose(out, whole)
    gradient = torch.autograd.grad(out[0, 6].sum(), value)[0]
    reached = gradient.abs().sum((0, 1, 3)).nonzero()[:, 0].tolist()
    assert set(reached) <= {6}, "the third document's first token sees itself alone"


@pytest.mark.parametrize(
    ("device", "more", "expected", "said"),
    [
        ("cpu", {}, "matmul", "matrix products per document"),
        ("cpu", {"softcap": 30.0}, "matmul", "matrix products per document"),
        ("cpu", {"dropout": 0.1}, "padded", "padded to the longest (attention dropout)"),
        ("mps", {}, "padded", "padded to the longest (no kernel for variable lengths on mps)"),
        ("mps", {"softcap": 30.0}, "matmul", "(no kernel for variable lengths on mps)"),
    ],
)
def test_which_kernel_without_cuda(device: str, more: Any, expected: str, said: str) -> None:
    kernel, why = kernel_for(torch.device(device), torch.bfloat16, (4, 2, 64), **more)
    assert kernel == expected
    assert attention.describe(kernel, why).endswith(said)


def test_torch_has_the_varlen_kernel_that_we_call() -> None:
    arguments = attention._varlen_arguments()
    assert arguments is not None
    assert {"scale", "window_size"} <= arguments


def test_a_package_that_cannot_be_loaded_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel that was built for another torch; and one that has a part of the name only."""
    (tmp_path / "of_another_torch.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    (tmp_path / "other_version.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not attention.can_import("of_another_torch")
    assert not attention.can_import("other_version", "flash_attn_varlen_func")
    assert attention.can_import("other_version")
    assert not attention.can_import("not_there")


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_told_to_be_deterministic(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own setting does not reach another package."""
    told: list[bool] = []

    def kernel(query: torch.Tensor, *_: Any, deterministic: bool, **__: Any) -> torch.Tensor:
        told.append(deterministic)
        return query

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    states = torch.zeros(3, 1, 4)
    attention._flash(states, states, states, attention._Call(segments((3,)), 1.0, None, None, 0.0))
    assert told == [deterministic]
