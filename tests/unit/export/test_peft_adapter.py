"""The PEFT folder, loaded by PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch

from eulerforge.errors import UsageError
from eulerforge.export.peft_adapter import write_peft
from eulerforge.export.rundir import TrainedRun
from eulerforge.lora.adapted import AdaptedModule
from eulerforge.lora.wrap import adapted_modules

MakeRun = Callable[..., TrainedRun]
IDS = torch.tensor([[5, 9, 33, 70, 12, 101, 4]])


@pytest.mark.parametrize(
    ("family", "ranks", "use_rslora"),
    [("llama", (4, 4, 4), False), ("qwen3", (4, 4, 2), False), ("llama", (8, 2, 8), True)],
)
def test_peft_computes_what_the_live_model_does(
    make_run: MakeRun, tmp_path: Path, family: str, ranks: tuple[int, ...], use_rslora: bool
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    run = make_run(family, ranks=ranks, use_rslora=use_rslora)
    write_peft(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.source.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of keys that it misses
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that is on its way out
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(run.source.folder, dtype=torch.float32).eval()(IDS).logits
        live, theirs = run.model(IDS).logits, model(IDS).logits
    torch.testing.assert_close(theirs, live, rtol=1e-5, atol=1e-5)
    assert (live - plain).abs().max() > 1e-3


def test_the_config_states_the_commonest_rank_and_lists_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    write_peft(make_run(ranks=(4, 4, 2)), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["rank_pattern"] == {f"model.layers.{layer}.self_attn.q_proj": 2 for layer in range(3)}
    assert len(config["target_modules"]) == 9
    # a reader that knows one scaling for all, as vLLM does, computes the same
    assert config["alpha_pattern"] == dict.fromkeys(config["rank_pattern"], 4.0)


def test_the_folder_has_the_tokenizer_and_its_chat_template(make_run: MakeRun, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = make_run()
    templates = run.source.folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    written = write_peft(run, tmp_path / "adapter")
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (run.source.folder, tmp_path / "adapter"))
    assert ours.chat_template == theirs.chat_template
    assert "tool_use" in ours.chat_template
    assert ours("What is a beam?").input_ids == theirs("What is a beam?").input_ids
    there = {str(path.relative_to(written.folder)) for path in written.folder.rglob("*") if path.is_file()}
    assert there == set(written.files)
    assert there.isdisjoint({"config.json", "generation_config.json", "model.safetensors"})
    assert not written.warnings


def test_a_base_in_the_cache_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    run = attrs.evolve(run, source=attrs.evolve(run.source, kind="gguf", name="tiny.gguf"))
    (problem,) = write_peft(run, tmp_path / "adapter").warnings
    assert "what tiny.gguf was converted to" in problem.message
    assert str(run.source.folder) in problem.message
    assert "eulerforge merge" in str(problem.hint)
    receipt = json.loads((tmp_path / "adapter" / "eulerforge_export.json").read_text())
    assert receipt["warnings"] == [problem.to_json()]


def test_an_adapter_cannot_hold_trained_base_tensors(make_run: MakeRun, tmp_path: Path) -> None:
    run = attrs.evolve(make_run(), trained_base={"model.norm.weight": torch.zeros(32)})
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        write_peft(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


DENSE = ("llama3", "qwen3", "qwen3_5", "qwen3_5_multimodal", "gemma3", "gemma3_multimodal")


def logits_in_peft(base: object, folder: Path) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of keys that it misses
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", DENSE)
def test_every_dense_family_is_the_same_in_peft(make_family_run: MakeRun, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    run = make_family_run(family)
    write_peft(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.source.folder, dtype=torch.float32)
    with torch.no_grad():
        live = run.model(IDS).logits
        plain = base.eval()(IDS).logits
    assert (live - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits_in_peft(base, tmp_path / "adapter"), live, rtol=1e-5, atol=1e-5)


def test_qwen3_5_has_a_form_for_the_multimodal_class_too(make_family_run: MakeRun, tmp_path: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    run = make_family_run("qwen3_5_multimodal")
    written = write_peft(run, tmp_path / "adapter", keys="multimodal")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in written.tensors)
    base = Qwen3_5ForConditionalGeneration.from_pretrained(run.source.folder, dtype=torch.float32)
    with torch.no_grad():
        live = run.model(IDS).logits
    torch.testing.assert_close(logits_in_peft(base, tmp_path / "adapter"), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama3", "gemma3_multimodal"])
def test_the_multimodal_form_is_refused_where_there_is_but_one(
    make_family_run: MakeRun, tmp_path: Path, family: str
) -> None:
    with pytest.raises(UsageError, match="multimodal is for a text model"):
        write_peft(make_family_run(family), tmp_path / "adapter", keys="multimodal")


def test_fused_experts_are_refused_with_the_way_out(make_family_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.experts has .* 4 fused experts") as caught:
        write_peft(make_family_run("mixtral"), tmp_path / "adapter")
    assert caught.value.problems[0].hint == "use --format merged"
    assert not (tmp_path / "adapter").exists()


class OfAnotherAuthor(AdaptedModule):
    """A strategy's own wrapper."""


def test_an_adapter_of_another_kind_has_no_peft_form(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    run.model.lm_head = OfAnotherAuthor(run.model.lm_head)
    with pytest.raises(UsageError, match="lm_head is a OfAnotherAuthor, which PEFT does not know") as caught:
        write_peft(run, tmp_path / "adapter")
    assert caught.value.problems[0].hint == "use --format merged"


def test_a_mixture_of_scalings_has_no_peft_form(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    next(iter(adapted_modules(run.model)))[1].use_rslora = True  # type: ignore[assignment]
    with pytest.raises(UsageError, match="some adapters use rsLoRA and some do not") as caught:
        write_peft(run, tmp_path / "adapter")
    assert caught.value.problems[0].hint == "use --format merged"
    assert not (tmp_path / "adapter").exists()
