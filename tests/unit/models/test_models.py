"""Adapters on tiny models of their families, sources, devices, and a model folder that is not whole."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model

from eulerforge.config.schema import LoadPrecision, ModelConfig, RunConfig
from eulerforge.errors import DeviceError, ModelError, PluginError, UsageError
from eulerforge.lora.apply import apply_injection
from eulerforge.models.device import pick_device
from eulerforge.models.load import load_model, load_tokenizer
from eulerforge.models.source import BaseSource, resolve_source, revision_of
from eulerforge.plugins import load_registry

REGISTRY = load_registry()
ROLES = {"ffn.gate", "ffn.up", "ffn.down", "attn.q", "attn.k", "attn.v", "attn.o"}


def run_config(folder: Path | str, mode: str = "fp32", **changes: object) -> RunConfig:
    config_class = REGISTRY.strategy_config("dense_lora")
    injection = changes.pop("injection", None) or config_class(lora_r=2)
    return RunConfig(
        model_name=str(folder),
        model=ModelConfig(load_precision=LoadPrecision(mode=mode)),
        injection=injection,
        **changes,
    )


@pytest.mark.parametrize(("family", "backbone"), [("llama", "llama3"), ("qwen3", "qwen3")])
def test_an_adapter_knows_its_family(family: str, backbone: str) -> None:
    model = tiny_model(family)
    spec = REGISTRY.backbone_for(model.config.model_type)
    assert spec is not None
    assert spec.name == backbone
    adapter = REGISTRY.create(spec)
    layers = adapter.find_transformer_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        sites = adapter.find_sites(layer)
        assert {site.role for site in sites} == ROLES
        assert all(isinstance(layer.get_submodule(site.path), torch.nn.Linear) for site in sites)
        assert not adapter.find_routers(layer)
    assert adapter.roles_of("q_proj") == ("attn.q",)
    assert not adapter.roles_of("q_pro")


def test_wrong_backbone_names_the_right_one() -> None:
    with pytest.raises(ModelError, match="does not fit") as caught:
        apply_injection(run_config("m", backbone="qwen3"), REGISTRY, tiny_model("llama"))
    assert caught.value.problems[0].hint == "--set backbone=llama3"


def test_a_named_backbone_is_taken_where_several_cover_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def several(*_: object) -> None:
        raise PluginError("several backbones cover it", hint="name one")

    monkeypatch.setattr(type(REGISTRY), "backbone_for", several)
    assert apply_injection(run_config("m", backbone="llama3"), REGISTRY, tiny_model("llama")).backbone.name == "llama3"
    with pytest.raises(PluginError, match="several"):
        apply_injection(run_config("m"), REGISTRY, tiny_model("llama"))


def test_a_misspelt_keyword_beside_good_ones_is_an_error_with_the_nearest_name() -> None:
    injection = REGISTRY.strategy_config("dense_lora")(target_keywords=("gate_proj", "upp_proj"))
    with pytest.raises(ModelError, match="'upp_proj' matches nothing") as caught:
        apply_injection(run_config("m", injection=injection), REGISTRY, tiny_model())
    assert "up_proj" in (caught.value.problems[0].hint or "")


def test_no_match_at_all_is_no_trainable_parameters_with_the_nearest_names() -> None:
    injection = REGISTRY.strategy_config("dense_lora")(target_keywords=("gate",))
    with pytest.raises(ModelError, match="No trainable parameters") as caught:
        apply_injection(run_config("m", injection=injection), REGISTRY, tiny_model())
    assert "gate_proj" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_layer_that_a_keyword_misses_stops_the_run_unless_allowed(allowed: bool) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.gate_proj = torch.nn.Identity()
    injection = REGISTRY.strategy_config("dense_lora")(target_keywords=("gate_proj",), allow_partial=allowed)
    run = run_config("m", injection=injection)
    if allowed:
        injected = apply_injection(run, REGISTRY, model)
        assert injected.warnings == ("gate_proj reaches 2 of 3 layers; not reached: 1",)
    else:
        with pytest.raises(ModelError, match="gate_proj reaches 2 of 3 layers; not reached: 1"):
            apply_injection(run, REGISTRY, model)


def test_only_adapters_train_after_an_injection() -> None:
    model = tiny_model()
    injected = apply_injection(run_config("m"), REGISTRY, model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for site in injected.report.sites for name in site.parameters}


def test_a_folder_loads_in_the_precision_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    asked = LoadPrecision(mode="bf16", compute_dtype="bf16")
    run = attrs.evolve(run_config(tmp_path), model=ModelConfig(load_precision=asked))
    loaded = load_model(run, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert load_tokenizer(run_config(tmp_path)).pad_token == "<pad>"


def test_a_missing_tensor_is_an_error_not_random_numbers(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing.*layers\.1\.mlp\.up_proj\.weight"):
        load_model(run_config(tmp_path), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("files", "given", "what", "way_out"),
    [
        (("resolved_config.toml",), "", "is a run of EulerForge, no model", "eulerforge merge"),
        (("resolved_config.toml", "final/manifest.json"), "final", "is a checkpoint of a run", "eulerforge merge"),
        (("adapter_config.json",), "", "holds a PEFT adapter, no model", "give the base"),
        (("resolved_config.toml", "logs/x"), "logs", "has no config.json", "give the folder of a Hugging Face model"),
    ],
)
def test_a_folder_that_training_wrote_is_told_from_a_model(
    tmp_path: Path, files: tuple[str, ...], given: str, what: str, way_out: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(ModelError, match=what) as caught:
        resolve_source(str(tmp_path / given))
    assert str(caught.value.problems[0].hint).startswith(way_out)


@pytest.mark.parametrize("damage", ["truncate", "config", "no weights", "pickle", "tokenizer"])
def test_a_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    save_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        (tmp_path / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "pickle":
        weights.rename(tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_model(run_config(tmp_path), device=torch.device("cpu"))
    (problem,) = caught.value.problems
    assert problem.key == "model_name"
    assert "\n" not in problem.message


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "nothing"])
def test_a_name_that_is_no_model_says_what_a_name_may_be(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        resolve_source(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there, so asking for it is no error")
def test_cuda_without_a_device_is_exit_4_with_the_way_out() -> None:
    with pytest.raises(DeviceError, match="no CUDA device") as caught:
        pick_device("cuda:0")
    assert caught.value.exit_code == 4
    assert caught.value.problems[0].hint == "--set device=cpu"


def test_device_names() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError):
        pick_device("gpu")
    with pytest.raises(UsageError):
        pick_device("meta")


class TestHub:
    """What the hub gives and does not give; the library that asks it is replaced."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        folder = tmp_path / "models--somebody--tiny" / "snapshots" / self.COMMIT
        folder.parent.mkdir(parents=True)
        save_tiny(folder, "llama")
        return folder

    def ask(self, monkeypatch: pytest.MonkeyPatch, given: Path | Exception) -> BaseSource:
        def download(*_: object, **__: object) -> str:
            if isinstance(given, Exception):
                raise given
            return str(given)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return resolve_source("somebody/tiny")

    def test_a_run_names_the_commit_that_it_trained_on(self, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = self.ask(monkeypatch, snapshot)
        assert source.kind == "hub"
        assert revision_of(source, None) == revision_of(source, "main") == self.COMMIT
        assert revision_of(BaseSource(kind="folder", name="x", folder=snapshot), "main") == "main"

    def test_a_gated_model_says_where_its_licence_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        error = OSError("You are trying to access a gated repo.\nMake sure to have access to it")
        with pytest.raises(ModelError, match="gated repo") as failed:
            self.ask(monkeypatch, error)
        assert "https://huggingface.co/somebody/tiny" in str(failed.value.problems[0].hint)
        assert "HF_TOKEN" in str(failed.value.problems[0].hint)

    def test_whatever_the_network_raises_is_the_networks_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class ReadError(Exception):
            """As of an HTTP library: no OSError."""

        with pytest.raises(ModelError, match="to be had from the hub: peer closed") as failed:
            self.ask(monkeypatch, ReadError("peer closed connection"))
        assert "run it again" in str(failed.value.problems[0].hint)

    def test_a_model_without_safetensors_may_have_pickles(
        self, snapshot: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (snapshot / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"no model\.safetensors") as failed:
            self.ask(monkeypatch, snapshot)
        assert "pickle" in str(failed.value.problems[0].hint)
