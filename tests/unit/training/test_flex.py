"""flex_attention over documents, on the CPU: its table of blocks against torch's own, its numbers through torch's
compiler without a code generator (which reads the mask, not the table), how often it is compiled, and what a run is
told when it cannot be."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

from eulerforge.api import BackboneSpec
from eulerforge.data.packing import Layout
from eulerforge.models.layout import DenseAdapter
from eulerforge.testing.tiny_models import tiny_model
from eulerforge.training import attention, flex
from eulerforge.training.attention import describe, kernel_for
from eulerforge.training.blocks import BlockRecord
from eulerforge.training.document_products import document_products
from eulerforge.training.forward import hidden_states
from eulerforge.training.isolation import isolate, prove

from .documents import reference, segments
from .packed_rows import random_rows

# torch's compiler looks at ``.grad`` of every input, and hides the warning where warnings are no errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
CPU = torch.device("cpu")
SHORT, LONG = (5, 1, 9, 3), (100, 1, 130, 469)


def states(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v (tokens, heads, width) that need gradients, and what comes back to the output."""
    queries, keys, width = heads
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(tokens, count, width, generator=generator) for count in (queries, keys, keys, queries)]
    return [tensor.to(dtype).requires_grad_(at < 3) for at, tensor in enumerate(drawn)]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """The kernel as torch's compiler sees it, computed by torch's own reference: on the CPU there is no other backward
    pass, and torch refuses inputs that need gradients, which is lifted here."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *states: None)
    counted = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(flex, "BACKEND", counted)
    yield counted
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    flex.refusal.cache_clear()


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("lengths", [SHORT, LONG, (128,), (129, 127), (40, 3) * 8])
def test_the_table_of_blocks_is_torchs_own_of_the_whole_mask(lengths: tuple[int, ...], window: int | None) -> None:
    borders = segments(lengths)
    ours = flex.block_mask(flex.first_keys(borders, window))
    place, document = torch.arange(sum(lengths)), borders.document_of[0]

    def seen(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        inside = (document[query] == document[key]) & (query >= key)
        return inside & (query - key < (window or len(place)))

    torchs = torch_flex.create_block_mask(seen, None, None, len(place), len(place), device="cpu")
    assert ours.seq_lengths == torchs.seq_lengths
    assert ours.BLOCK_SIZE == torchs.BLOCK_SIZE
    assert torch.equal(ours.mask_mod(0, 0, place[:, None], place), seen(0, 0, place[:, None], place))
    for name in ("kv", "q", "full_kv", "full_q"):
        count, true_count = getattr(ours, f"{name}_num_blocks"), getattr(torchs, f"{name}_num_blocks")
        assert torch.equal(count, true_count), name
        listed = torch.arange(ours.kv_indices.shape[-1]) < count[..., None]
        indices, true_indices = getattr(ours, f"{name}_indices"), getattr(torchs, f"{name}_indices")
        assert torch.equal(indices[listed], true_indices[listed]), name


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 5)])
def test_output_and_gradients_are_the_references(heads: tuple[int, int, int], counter: Any) -> None:
    for lengths in (SHORT, LONG):
        for window, cap in ((None, None), (40, None), (2, 1.5), (None, 2.0)):
            *inputs, upstream = states(heads, sum(lengths))
            out = flex.flex_documents(*inputs, segments(lengths), 0.3, window, cap)
            found = (out, *torch.autograd.grad(out, inputs, upstream))
            products = document_products(*inputs, lengths, 0.3, window, cap)
            layers = (part.transpose(0, 1)[None] for part in inputs)
            for wanted in (reference(*layers, lengths, 0.3, window, cap)[0], products):
                true = (wanted, *torch.autograd.grad(wanted, inputs, upstream))
                torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)
    assert counter.frame_count, "it went through the compiler"


def test_new_lengths_windows_scales_and_caps_compile_nothing_anew(counter: Any) -> None:
    def run(lengths: tuple[int, ...], scale: float, window: int | None, cap: float | None) -> None:
        *inputs, upstream = states((4, 2, 16), sum(lengths), torch.float32)
        borders = segments(lengths)
        for _layer in range(2):
            flex.flex_documents(*inputs, borders, scale, window, cap).backward(upstream)

    run((100, 300, 170), 0.3, None, None)  # five blocks: unlike the heads, which torch would take for the same number
    assert counter.frame_count == 1
    for lengths in ((300,), (20,) * 30, (129,), (256,), (7, 500, 3)):
        run(lengths, 0.25, None, None)
        run(lengths, 0.5, 20 + lengths[0], None)
    assert counter.frame_count == 1
    for cap in (2.0, 3.0, 50.0):
        run((90, 490 + int(cap)), 1 / cap, 30, cap)
    assert counter.frame_count == 2


@torch._dynamo.config.patch(recompile_limit=1)
def test_torchs_own_limit_of_kernels_does_not_end_a_run(counter: Any) -> None:
    for width in (16, 17, 18):
        *inputs, _ = states((2, 1, width), 150, torch.float32)
        flex.flex_documents(*inputs, segments((90, 60)), 0.3)
    assert counter.frame_count == 3


def test_masks_are_made_once_for_all_layers_and_go_with_the_batch(
    counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    build = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda first: made.append(weakref.ref(first)) or build(first))
    borders = segments((100, 70))
    for _layer in range(3):
        for window in (None, 30):
            *inputs, upstream = states((2, 1, 16), 170, torch.float32)
            flex.flex_documents(*inputs, borders, 0.3, window).backward(upstream)
    assert len(made) == 2
    assert all(first() is not None for first in made)
    del borders
    gc.collect()
    assert all(first() is None for first in made)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_a_model_computes_the_same_with_it(family: str, counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).double()
    for layer in model.get_decoder().layers:
        layer.self_attn.attn_logit_softcapping = 2.0  # gemma's own
    spec = BackboneSpec(name="tried", target="a.b:C", summary="", model_types=(), isolation="attention")
    isolate(model, spec, DenseAdapter())
    rows = random_rows([9, 1, 30, 17, 4])
    batch = Layout(packing="flat", batch_size=8, max_length=40, token_budget=64, pad_id=0).batch(
        rows, [list(range(5))], CPU
    )
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        states = hidden_states(model, batch)
        upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).double()
        return states, torch.autograd.grad(states, weight, upstream)[0]

    wanted = computed()
    monkeypatch.setattr(attention, "kernel_for", lambda *of, **more: ("flex", ""))
    torch.testing.assert_close(computed(), wanted, rtol=1e-7, atol=1e-7)
    assert counter.frame_count
    assert prove(model) < 1e-4


@pytest.mark.parametrize("capped", [False, True])
def test_a_kernel_that_works_is_not_refused(capped: bool, counter: Any) -> None:
    drawn = torch.get_rng_state()
    with torch.inference_mode():
        assert flex.refusal(CPU, torch.float32, (4, 2, 16), capped) == ""
        assert flex.refusal(CPU, torch.float32, (4, 2, 16), capped) == ""
    assert counter.frame_count == 1, "tried once"
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_wrong_kernel_is_refused(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = flex.first_keys
    monkeypatch.setattr(flex, "first_keys", lambda segments, window: right(segments, window) * 0)
    assert flex.refusal(CPU, torch.float32, (4, 2, 16)).startswith("its result is wrong by ")
    monkeypatch.setattr(flex, "flex_documents", lambda q, k, v, *others: q * k.sum() * v.sum() * math.nan)
    assert flex.refusal(CPU, torch.float64, (4, 4, 16)).startswith("its result is wrong by nan")


def test_what_the_compiler_says_is_passed_on(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no triton here\nand a page of trace")

    monkeypatch.setattr(flex, "BACKEND", broken)
    found = flex.refusal(CPU, torch.bfloat16, (4, 2, 16))
    assert "no triton here" in found
    assert "\n" not in found


GPU, BF16 = torch.device("cuda:0"), torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "width", "more", "flash", "varlen", "refused", "expected"),
    [
        (BF16, 128, {}, True, True, "", "flash-attn"),
        (BF16, 128, {"softcap": 30.0}, True, True, "", "flash-attn"),
        (BF16, 128, {}, False, True, "", "varlen"),
        (BF16, 128, {}, False, False, "", "flex"),
        (BF16, 128, {}, False, False, "no triton", "padded"),
        (BF16, 128, {"softcap": 30.0}, False, True, "", "flex"),
        (BF16, 128, {"softcap": 30.0}, False, True, "no triton", "matmul"),
        (BF16, 512, {}, True, True, "", "flex"),
        (BF16, 512, {}, True, True, "too wide", "padded"),
        (torch.float32, 64, {}, True, True, "", "flex"),
        (torch.float32, 64, {}, True, True, "no triton", "padded"),
        (torch.float32, 64, {"softcap": 30.0}, True, True, "", "flex"),
        (torch.float32, 64, {"softcap": 30.0}, True, True, "no triton", "matmul"),
        (torch.float32, 64, {"dropout": 0.1}, True, True, "", "padded"),
        (BF16, 64, {"dropout": 0.1}, True, True, "", "padded"),
    ],
)
def test_which_kernel_on_cuda(
    dtype: torch.dtype,
    width: int,
    more: dict[str, float],
    flash: bool,
    varlen: bool,
    refused: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_runs_flash_attention", lambda device: True)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: flash)
    monkeypatch.setattr(attention, "_varlen_arguments", lambda: frozenset({"scale"}) if varlen else None)
    asked: list[Any] = []
    monkeypatch.setattr(flex, "refusal", lambda *of: asked.append(of) or refused)
    kernel, why = kernel_for(GPU, dtype, (8, 2, width), **more)
    assert kernel == expected
    said = describe(kernel, why)
    if refused:
        assert said.endswith(f"(flex_attention cannot be used: {refused})")
    else:
        assert ("attention dropout" in said) == ("dropout" in more)
    tried = [(GPU, dtype, (8, 2, width), "softcap" in more)]
    assert asked == (tried if refused or expected == "flex" else [])


def test_the_estimate_of_memory_may_be_the_first_to_ask(counter: CompileCounterWithBackend) -> None:
    """It records what a layer makes in a dispatch mode, in which torch compiles nothing unless the mode lets it."""
    with BlockRecord([], torch.device("cpu")) as record:
        assert flex.refusal(CPU, torch.float32, (4, 2, 16)) == ""
    assert counter.frame_count > 0
    assert record.events


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "flex"), ((8, 0), "varlen"), ((9, 0), "varlen")])
def test_a_card_before_ampere_gets_no_flash_attention(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    monkeypatch.setattr(attention, "_varlen_arguments", lambda: frozenset({"scale"}))
    monkeypatch.setattr(flex, "refusal", lambda *_: "")
    attention._runs_flash_attention.cache_clear()
    try:
        assert kernel_for(GPU, torch.float16, (8, 2, 64))[0] == expected
    finally:
        attention._runs_flash_attention.cache_clear()
