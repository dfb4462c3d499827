"""Errors that nothing else in the suite meets: each is made through a command or a public function.

``tests/sitewatch.py`` names what no test reaches; what it named, and no other test was about, is here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import tiny
import tinyrun
import torch
from torch import nn

from eulerforge.api import Site
from eulerforge.cli import plugins_new
from eulerforge.cli.main import main
from eulerforge.config.document import read_document
from eulerforge.config.schema import DataConfig, LoadPrecision, ModelConfig, RunConfig
from eulerforge.data.packing import Segments
from eulerforge.data.prompt import asked_of, render_prompt
from eulerforge.data.render import Renderer
from eulerforge.data.rows import ProcessedRow
from eulerforge.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EulerForgeError,
    ModelError,
    PluginError,
    RunError,
    UsageError,
)
from eulerforge.evaluation.bench import held_out_rows
from eulerforge.export.merged import verify_loads
from eulerforge.lora.apply import apply_injection
from eulerforge.lora.coverage import layer_names
from eulerforge.lora.state import load_adapter_state
from eulerforge.models.layout import DenseAdapter
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.load import load_model
from eulerforge.models.quantized import plan_from_config, plan_of
from eulerforge.models.soundness import check_folder, refuse_ids_beyond
from eulerforge.models.source import resolve_source
from eulerforge.plugins import load_registry
from eulerforge.training.attention import documents_attention
from eulerforge.training.prefix import FrozenPrefix
from eulerforge.training.recompute import recompute_layers

CPU = torch.device("cpu")
BASE = tiny.tiny_model


@contextmanager
def refused(kind: type[EulerForgeError], subject: str, hint: str) -> Iterator[None]:
    """The block raises this class; its one line speaks of ``subject``, its hint of ``hint``."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    problem = caught.value.problems[0]
    first, second = problem.lines()
    assert subject in first
    assert hint in second


def fails(capsys: pytest.CaptureFixture[str], words: list[str], code: int, subject: str, hint: str) -> None:
    """The command ends with this code and says ``subject`` in its error line and ``hint`` in its hint."""
    capsys.readouterr()
    assert main(words) == code
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("hint: ")
    assert subject in first
    assert hint in second


# presets


@pytest.mark.parametrize(
    ("setting", "subject", "hint"),
    [
        ("injection.layer_indices=[0, 1]", "exclude each other", "keep one"),
        ("injection.layer_indices=[2, 2]", "must be distinct", "such as"),
        (f"training.lr=1{'0' * 400}", "the number is too large", ""),
        ('output_dir=" "', "the name of a folder is wanted", "leave it out"),
        ("data.path=.", ". is a folder", "name the files in it"),
        ("injection.target_keywords=[]", "No trainable parameters", "target_keywords ="),
    ],
)
def test_a_setting_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, subject: str, hint: str
) -> None:
    words = tinyrun.arguments(tmp_path, injection__attn_lora__enabled=False)
    start = ["--set", "injection.start_layer=1"] if "exclude" in subject else []
    fails(capsys, [*words, *start, "--set", setting, "--validate-only"], 2, subject, hint)


@pytest.mark.parametrize(
    ("name", "text", "subject", "hint"),
    [
        ("deep.toml", ".".join("a" * 200) + " = 1\n", "nested too deeply", "levels at most"),
        ("tab.yml", "training:\n\tlr: 1\n", "tab.yml:2: found character", "indent with spaces"),
        ("bell.yml", 'model_name: "\a"\n', "malformed YAML", "look at that line"),
        ("half.yml", 'model_name: "\\ud800"\n', "half of a surrogate pair", "write the character"),
    ],
)
def test_a_preset_file_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, subject: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    fails(capsys, ["train", "--preset", str(path), "--validate-only"], 2, subject, hint)


def test_a_preset_that_cannot_be_read(tmp_path: Path) -> None:
    with refused(ConfigError, f"{tmp_path}/a.toml: the preset cannot be read: No such file", "that you can read"):
        read_document(tmp_path / "a.toml")


# rows


def templated(template: str) -> Any:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_rows_that_a_template_cannot_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    cases = {
        "leaves nothing of turn 2 to learn": "{% for m in messages if m.role == 'user' %}U{{ m.content }}{% endfor %}",
        "changes an answer when more turns follow": (
            "{% for m in messages %}{{ 'U' if m.role == 'user' else 'A' }}"
            "{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}A{% endif %}"
        ),
    }
    for nth, (subject, template) in enumerate(cases.items()):
        base = tiny.save_tiny(tmp_path / f"base{nth}")
        templated(template).save_pretrained(base)
        words = tinyrun.arguments(tmp_path, model_name=str(base), data__cache=False)
        fails(capsys, words, 2, subject, "")


def test_a_prompt_that_is_no_row() -> None:
    tokenizer, config = tiny.tiny_tokenizer(), DataConfig()
    with refused(DataError, "prompt: must be a string, not a number", "mend that row"):
        render_prompt(tokenizer, config, {"prompt": 7})
    row = ProcessedRow(where="rows.jsonl:3", place=3, input_ids=(1, 2), labelled=(True, True))
    with refused(DataError, "rows.jsonl:3: a row of token ids has no text", "give rows of text"):
        asked_of(Renderer(config, tokenizer), row)


# models


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with refused(ModelError, "there is no file", "path of a .gguf"):
        resolve_source(str(tmp_path / "a.gguf"))
    with refused(ModelError, f"{tmp_path}: the folder has no config.json", "folder of a Hugging Face model"):
        resolve_source(str(tmp_path))
    with refused(ModelError, "nobody/nothing is neither a local folder nor to be had from the hub", "the network"):
        resolve_source("nobody/nothing")


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "a.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    with refused(ModelError, "a.gguf cannot be converted", "transformers imports"):
        resolve_source(str(broken))
    base = tiny.save_tiny(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.rename(tmp_path / "away")
    weights.mkdir()
    with refused(ModelError, "model.safetensors cannot be read: Is a directory", ""):
        check_folder(base)
    weights.rmdir()
    (tmp_path / "away").rename(weights)
    run = RunConfig(
        model_name=str(base),
        model=ModelConfig(load_precision=LoadPrecision(mode="fp32"), attn_implementation="flash_attention_2"),
        injection=None,
    )
    with refused(ModelError, "model.attn_implementation: ", "--set model.attn_implementation=auto"):
        load_model(run, device=CPU)
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "of_tomorrow"}))
    with refused(ModelError, "base cannot be loaded", "--debug shows the whole error"):
        plan_from_config(base, LoadPrecision(mode="int4"), torch.float32, remote_code=False)


def test_models_without_what_is_looked_for() -> None:
    with refused(ModelError, "Linear has no decoder layers", "load it in bf16"):
        plan_of(nn.Linear(2, 2), LoadPrecision(mode="int4"), torch.float32)
    with refused(ModelError, "Linear has no decoder layers that DenseAdapter knows", "name another backbone"):
        DenseAdapter().find_transformer_layers(nn.Linear(2, 2))
    with refused(ModelError, "gives a layer that is not in the model", "find_transformer_layers"):
        layer_names(BASE(), DenseAdapter(), [nn.Linear(2, 2)])
    with refused(ModelError, "weight of a Embedding", "bf16"):
        linear_ops_from(load_registry())(nn.Embedding(2, 2))
    with refused(CheckpointError, "does not fit the model: 0 tensors are missing, 1 are not expected", "same targets"):
        load_adapter_state(BASE(), {"model.x.lora_A": torch.zeros(1)})
    with refused(UsageError, "the decoder layers of Llama", "gradient_checkpointing=all"):
        recompute_layers(BASE(), [nn.Linear(2, 2)], 2)


def test_a_special_token_beyond_the_embedding() -> None:
    tokenizer = tiny.tiny_tokenizer()
    rows = tokenizer.eos_token_id
    with refused(ModelError, f"the end-of-text token has the id {rows}, and the embedding", "from one place"):
        refuse_ids_beyond(rows, tokenizer, highest=None, name="base")


def test_a_frozen_layer_of_another_shape() -> None:
    class Pair(nn.Module):
        def forward(self, states: torch.Tensor, **_: Any) -> Any:
            return states, None

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Pair()])

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(last_hidden_state=self.layers[0](torch.zeros(1, 1, 4))[0])

    prefix = FrozenPrefix(Decoder(), 1, tokens=4, width=4, dtype=torch.float32)
    with refused(RunError, "a decoder layer gives a tuple, not its hidden states", "cache_frozen_prefix=false"):
        prefix.prove(BASE())


def test_attention_that_is_both_capped_and_dropped() -> None:
    states = [torch.zeros(1, 1, 4, 2) for _ in range(3)]
    segments = Segments(lengths=(4,), shape=(1, 4), device=CPU)
    with refused(RunError, "attention dropout and soft-capping together", "data.packing=off"):
        documents_attention(nn.Identity(), *states, None, dropout=0.1, softcap=2.0, segments=segments)


# injection


def test_a_family_that_no_plugin_covers() -> None:
    registry = load_registry(disable=["llama3"])
    run = RunConfig(model_name="m", backbone="auto", injection=registry.strategy_config("dense_lora")())
    with refused(PluginError, "no installed backbone covers model_type 'llama'", "plugins list"):
        apply_injection(run, registry, BASE())


def test_a_place_that_dense_lora_cannot_wrap() -> None:
    class Norms(DenseAdapter):
        def find_sites(self, layer: nn.Module) -> Any:
            return [Site(path="input_layernorm", role="norm")]

    @attrs.frozen
    class Registry:
        real: Any

        def create(self, spec: Any) -> Any:
            return Norms() if spec.name == "llama3" else self.real.create(spec)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    registry: Any = Registry(load_registry())
    injection = registry.strategy_config("dense_lora")(target_keywords=("input_layernorm",), match="exact")
    run = RunConfig(model_name="m", backbone="llama3", injection=injection)
    with refused(ModelError, "input_layernorm is a LlamaRMSNorm, neither a linear module", "out of the keywords"):
        apply_injection(run, registry, BASE())


# runs and exports


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, nothing held out; tests only read it."""
    folder = tinyrun.prepare(tmp_path_factory.mktemp("finished"))
    assert main(tinyrun.arguments(folder, **STEPS)) == 0
    return folder


STEPS: dict[str, Any] = {"training__save_steps": 2, "training__scheduler": "constant", "training__threads": 1}


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def test_commands_on_a_run_that_do_not_fit_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(finished / "run")
    export = ["export", run, "--output", str(tmp_path / "out"), "--format"]
    fails(capsys, [*export, "merged", "--keys", "multimodal"], 2, "--keys is for --format peft", "leave --keys out")
    (tmp_path / "file").write_text("")
    fails(capsys, ["merge", run, "--output", str(tmp_path / "file")], 2, "is a file", "another --output")
    fails(capsys, ["bench", run], 2, "data.validation: the run held no rows out", "--data FILE")


def test_a_preset_that_was_changed_after_the_training(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "resolved_config.toml"
    text = path.read_text()
    assert "lora_alpha = 8" in text
    path.write_text(text.replace("lora_alpha = 8", "lora_alpha = 9"))
    fails(capsys, ["merge", str(copy)], 2, "injects something else than the run was trained with", "put the file back")


def test_a_log_that_was_cut(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "metrics.jsonl"
    rows = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line).get("step") != 3]
    path.write_text("".join(rows))
    fails(capsys, ["replay", str(copy), "--steps", "2", "--from", "2"], 2, "no row for step 3", "--steps must end")


def test_a_run_that_is_to_end_before_its_newest_checkpoint(
    finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "final")
    words = tinyrun.arguments(finished, **STEPS, output_dir=str(copy), training__max_train_steps=2)
    fails(capsys, [*words, "--resume"], 2, "is at step 4, and the run would end at step 2", "--overwrite")


def test_a_run_in_its_own_base(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for inside in ("base", "base/run"):
        words = tinyrun.arguments(finished, **STEPS, output_dir=str(finished / inside))
        fails(capsys, words, 2, f"{inside} is in the base model's own folder", "--output-dir")
    assert not list((finished / "base").rglob("resolved_config.toml"))


@pytest.mark.parametrize(("warmup", "warned"), [(23, False), (24, True)])
def test_a_warm_up_that_fills_a_run_of_epochs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: int, warned: bool
) -> None:
    epochs = {"training__max_train_steps": None, "training__num_epochs": 2, "training__warmup_steps": warmup}
    assert main(tinyrun.arguments(finished, **epochs, output_dir=str(tmp_path / "run"), training__threads=1)) == 0
    shown = capsys.readouterr().err
    assert "step 24/24" in shown
    wanted = "warning: training.warmup_steps: the warm-up of 24 steps fills the run, which ends at 24: training.lr"
    assert (wanted in shown) == warned == ("hint: a tenth of the steps is usual" in shown)


def test_a_generation_config_that_the_base_has_lost(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, lost = tmp_path / "kept", tmp_path / "lost"
    assert main(["merge", str(finished / "run"), "--output", str(kept)]) == 0
    assert "generation_config" not in capsys.readouterr().err
    assert json.loads((kept / "eulerforge_export.json").read_text())["warnings"] == []
    file = finished / "base" / "generation_config.json"
    text = file.read_text()
    file.unlink()
    try:
        assert main(["merge", str(finished / "run"), "--output", str(lost)]) == 0
    finally:
        file.write_text(text)
    shown = capsys.readouterr().err
    assert "warning: the base had a generation_config.json when the run was trained, and has none now" in shown
    assert "hint: put the base's generation_config.json into the folder" in shown
    (warning,) = json.loads((lost / "eulerforge_export.json").read_text())["warnings"]
    assert warning["message"].startswith("the base had a generation_config.json")


def test_plugins_new_where_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plugins", "new", "olmo", "--kind", "backbone", "--output"]
    (tmp_path / "file").write_text("")
    fails(capsys, [*words, str(tmp_path / "file" / "sub")], 2, "cannot be written", "a folder of yours")
    # somebody else makes the folder after we have looked
    (tmp_path / "eulerforge-backbone-olmo").mkdir()
    monkeypatch.setattr(plugins_new.os.path, "lexists", lambda _: False)
    fails(capsys, [*words, str(tmp_path)], 2, "nothing is overwritten", "another NAME")
    assert list((tmp_path / "eulerforge-backbone-olmo").iterdir()) == []


def test_an_export_that_transformers_cannot_load(tmp_path: Path) -> None:
    with refused(RunError, "the export does not load", "--no-verify"):
        verify_loads(tmp_path)


def test_held_out_rows_of_a_run_without_any(tmp_path: Path) -> None:
    data = DataConfig(path=(str(tiny.write_rows(tmp_path / "rows.jsonl")),), cache=False)
    base: Any = SimpleNamespace(run=SimpleNamespace(data=data, seed=1), tokenizer=tiny.tiny_tokenizer())
    with refused(UsageError, "data.validation: the run held no rows out", "--data FILE"):
        held_out_rows(base)
