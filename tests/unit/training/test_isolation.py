"""No document of a packed row sees another, in every family, and the model comes back as it was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from eulerforge.api import BackboneSpec
from eulerforge.data.packing import Layout
from eulerforge.errors import PluginError, RunError
from eulerforge.models.layout import DenseAdapter
from eulerforge.testing.tiny_models import FAMILIES, tiny_model
from eulerforge.training import isolation
from eulerforge.training.forward import hidden_states
from eulerforge.training.isolation import isolate, leak, prove

from .packed_rows import random_rows

HYBRIDS = tuple(family for family in FAMILIES if family.startswith("qwen3_5"))


class MixerAdapter(DenseAdapter):
    def find_sequence_mixers(self, layer: nn.Module) -> Sequence[str]:
        return ["linear_attn"] if hasattr(layer, "linear_attn") else []


def spec(how: str) -> BackboneSpec:
    return BackboneSpec(name="tried", target="a.b:C", summary="", model_types=(), isolation=how)


def loud_model(family: str) -> Any:
    """A tiny model whose logits are of the order of 1, so that a leak cannot hide in small numbers."""
    model = tiny_model(family)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def largest_difference(model: Any, packing: str) -> float:
    """Packed logits against those of one row at a time, the model called in the ordinary way."""
    rows = random_rows([9, 1, 30, 17, 4])
    layout = Layout(packing=packing, batch_size=8, max_length=40, token_budget=64, pad_id=0)
    (lines,) = layout.cut(rows, range(5))
    batch = layout.batch(rows, lines, "cpu")
    packed = model.get_output_embeddings()(hidden_states(model, batch))
    worst = 0.0
    for at, line in enumerate(lines):
        place = 0
        for index in line:
            ids = torch.tensor(rows.row(index)[0].astype("int64"))[None]
            alone = model(input_ids=ids, use_cache=False).logits[0]
            assert float(alone.abs().max()) > 0.5
            worst = max(worst, float((packed[at, place : place + ids.shape[1]] - alone).abs().max()))
            place += ids.shape[1]
    return worst


@pytest.mark.parametrize("packing", ["flat", "bins", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_the_separate_ones(family: str, packing: str) -> None:
    model = loud_model(family)
    installed = isolate(model, spec("gather"), MixerAdapter())
    assert installed.possible
    assert bool(installed.mixers) == (family in HYBRIDS)
    difference = largest_difference(model, packing)
    print(f"{family}, {packing}: largest difference of packed and separate logits {difference:.2e}")
    assert difference < 1e-4
    assert prove(model) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_comes_back_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    names, before_attention = list(model.state_dict()), model.get_decoder().config._attn_implementation
    installed = isolate(model, spec("gather"), MixerAdapter())
    assert list(model.state_dict()) == names, "checkpoints keep their keys"
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before), "an ordinary call is untouched"
    installed.remove()
    assert model.get_decoder().config._attn_implementation == before_attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_generation_goes_on_as_before() -> None:
    model = loud_model("qwen3_5")
    ids = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **settings)
    isolate(model, spec("gather"), MixerAdapter())
    assert torch.equal(model.generate(ids, **settings), before)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_leak_is_found_and_refused(family: str) -> None:
    model = loud_model(family)
    isolate(model, spec("attention"), MixerAdapter())
    with pytest.raises(RunError, match="packed documents see each other") as caught:
        prove(model)
    assert "data.packing=off" in str(caught.value.problems[0].hint)
    assert leak(model) > 1e-3


def test_attention_that_ignores_the_borders_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from eulerforge.training import attention

    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())

    def whole_row(q: Any, k: Any, v: Any, call: Any) -> torch.Tensor:
        states = [part.transpose(0, 1)[None] for part in (q, k, v)]
        out = nn.functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    monkeypatch.setitem(attention._KERNELS, "matmul", whole_row)
    with pytest.raises(RunError, match="packed documents see each other"):
        prove(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_that_go_on_from_a_prefix_are_the_separate_ones(family: str) -> None:
    model = loud_model(family)
    isolated = isolate(model, spec("gather"), MixerAdapter())
    assert isolated.goes_on == (family not in HYBRIDS)
    if isolated.goes_on:
        assert prove(model, shares=True) < 1e-6


def test_a_prefix_that_is_not_seen_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes a document which goes on for one that begins anew."""
    from eulerforge.training import attention

    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())

    def anew(q: Any, k: Any, v: Any, call: Any) -> torch.Tensor:
        return attention.document_products(q, k, v, call.segments.lengths, call.scale)

    monkeypatch.setitem(attention._KERNELS, "matmul", anew)
    assert prove(model) < 1e-6
    with pytest.raises(RunError, match="packed documents see each other"):
        prove(model, shares=True)


def test_the_line_names_the_kernel_that_the_config_asks_for() -> None:
    model = tiny_model("gemma3")
    isolated = isolate(model, spec("attention"), DenseAdapter())
    assert isolated.line("flat") == "rows are packed (flat); attention: matrix products per document"
    isolated.remove()
    model.config.get_text_config().attention_dropout = 0.1
    line = isolate(model, spec("attention"), DenseAdapter()).line("flat")
    assert line.endswith("over documents padded to the longest (attention dropout)")


def test_the_kernel_is_asked_for_with_the_configs_heads_and_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def kernel_for(*of: Any, **more: Any) -> tuple[str, str]:
        asked.append((of[0], of[2], more))
        return "padded", "flex_attention cannot be used: no triton"

    monkeypatch.setattr(isolation, "kernel_for", kernel_for)
    model = tiny_model("gemma3")
    text = model.config.get_text_config()
    text.attn_logit_softcapping = 30.0
    line = isolate(model, spec("attention"), DenseAdapter(), device=torch.device("cuda", 1)).line("flat")
    heads = (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    assert asked == [(torch.device("cuda", 1), heads, {"dropout": 0.0, "softcap": 30.0})]
    assert line.endswith("padded to the longest (flex_attention cannot be used: no triton)")


@pytest.mark.parametrize(("seen", "seeing"), list(permutations(range(3), 2)))
def test_each_document_is_held_against_each_other_one(seen: int, seeing: int) -> None:
    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())
    assert leak(model) < 1e-6

    lengths = iter(isolation.PROBE_LENGTHS)

    def one_sees_another(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        parts = list(output.split(next(lengths), 1))
        parts[seeing] = parts[seeing] + 0.1 * parts[seen].mean(1, keepdim=True)
        return torch.cat(parts, 1)

    model.get_input_embeddings().register_forward_hook(one_sees_another)
    assert leak(model) > 1e-3


def test_what_all_documents_take_from_the_whole_row_is_found() -> None:
    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())

    def all_see_the_mean(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * output.mean(1, keepdim=True)

    model.get_input_embeddings().register_forward_hook(all_see_the_mean)
    assert leak(model) > 1e-3


def test_positions_that_go_on_over_a_border_are_found() -> None:
    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())

    def by_the_place_in_the_row(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.linspace(-1, 1, output.shape[1])[None, :, None]

    model.get_input_embeddings().register_forward_hook(by_the_place_in_the_row)
    assert leak(model) > 1e-3


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_leak_of_the_last_layer_is_found_whatever_the_size_of_the_states(scale: float) -> None:
    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())
    decoder = model.get_decoder()
    with torch.no_grad():
        decoder.norm.weight.fill_(scale)
    assert prove(model) < 1e-6

    def reads_the_one_before(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * output.roll(9, 1)

    decoder.layers[-1].register_forward_hook(reads_the_one_before)
    assert leak(model) > 1e-3
    with pytest.raises(RunError, match="packed documents see each other"):
        prove(model)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("document", [0, 1, 2])
def test_states_that_are_no_numbers_prove_nothing(row: int, document: int) -> None:
    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())
    rows = iter(enumerate(isolation.PROBE_LENGTHS))

    def one_document(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        at, lengths = next(rows)
        parts = list(output.split(lengths, 1))
        parts[document] = parts[document] * (torch.nan if at == row else 1)
        return torch.cat(parts, 1)

    model.get_decoder().norm.register_forward_hook(one_document)
    with pytest.raises(RunError, match="by nan of their length"):
        prove(model)


def test_the_proof_computes_no_logits() -> None:
    model = loud_model("llama3")
    isolate(model, spec("attention"), DenseAdapter())

    def never(module: nn.Module, args: Any) -> None:
        raise AssertionError("the head was called")

    model.get_output_embeddings().register_forward_pre_hook(never)
    assert prove(model) < 1e-6


def test_the_mode_comes_back() -> None:
    model = tiny_model("llama3").train()
    isolate(model, spec("attention"), DenseAdapter())
    prove(model)
    assert model.training


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral", "qwen3_5"])
def test_a_named_attention_stays_and_is_isolated_by_transformers(family: str, implementation: str) -> None:
    model = loud_model(family)
    model.set_attn_implementation(implementation)
    installed = isolate(model, spec("gather"), MixerAdapter(), keep_attention=True)
    assert model.get_decoder().config._attn_implementation == implementation
    assert implementation in installed.line("flat")
    assert largest_difference(model, "flat") < 1e-4
    assert prove(model) < 1e-6


def test_a_backbone_that_says_nothing_is_not_packed() -> None:
    model = tiny_model("llama3")
    installed = isolate(model, BackboneSpec(name="old", target="a:b", summary="", model_types=()), DenseAdapter())
    assert not installed.possible
    assert "backbone old does not say" in installed.line("off")
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_gather_without_the_places_is_the_plugins_fault() -> None:
    with pytest.raises(PluginError, match="no find_sequence_mixers"):
        isolate(tiny_model("llama3"), spec("gather"), DenseAdapter())


def test_a_decoder_that_takes_no_segments_is_named() -> None:
    model = tiny_model("llama3")
    decoder = model.get_decoder()
    call = decoder.forward
    decoder.forward = lambda input_ids, attention_mask=None, position_ids=None, use_cache=None: call(
        input_ids, position_ids=position_ids, use_cache=use_cache
    )
    isolate(model, spec("attention"), DenseAdapter())
    with pytest.raises(RunError, match="a packed row cannot be computed: TypeError"):
        prove(model)


def test_a_decoder_that_drops_the_segments_is_named() -> None:
    model = tiny_model("llama3")
    decoder = model.get_decoder()
    call = decoder.forward
    decoder.forward = lambda segments=None, **rest: call(**rest)
    isolate(model, spec("attention"), DenseAdapter())
    with pytest.raises(RunError, match="was not told where the documents"):
        prove(model)


def test_the_fast_kernels_get_the_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_border_kernels", lambda device: True)
    seen: dict[str, Any] = {}

    class Mixer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.update(kwargs)
            return hidden_states

    mixer = Mixer()
    hook = isolation._Gather(mixer)
    borders = isolation.Segments(lengths=(2, 3), shape=(1, 5), device=torch.device("cpu"))
    states = torch.randn(1, 5, 4)
    assert torch.equal(mixer(hidden_states=states, segments=borders), states)
    assert seen["cu_seq_lens_q"].tolist() == [0, 2, 5]
    assert seen["seq_idx"].tolist() == [[0, 0, 1, 1, 1]]
    assert "segments" not in seen
    hook.remove()
