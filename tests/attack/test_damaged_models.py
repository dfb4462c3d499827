"""Every file of a model folder, spoiled in every way: named by the command line, never used, never a traceback.

What no look at the folder can tell (a weight that is another number, a letter of a template) is refused by a resume.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
import tiny
import tinyrun
import torch
from safetensors.torch import load_file, save_file

from eulerforge.cli.main import main
from eulerforge.models.soundness import INDEX, SINGLE

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", SINGLE,
)  # fmt: skip
# Damages after which the folder is another one, sound in itself: nothing can tell before a resume compares.
UNTOLD = {
    ("chat_template.jinja", "removed"),
    ("chat_template.jinja", "middle_bit_flipped"),
    ("generation_config.json", "removed"),
    ("generation_config.json", "middle_bit_flipped"),
    (SINGLE, "middle_bit_flipped"),
    (SINGLE, "last_bit_flipped"),
}
Shown = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyrun.prepare(tmp_path_factory.mktemp("good"), rows=8)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good one: base and rows.jsonl."""
    return damage.copy(good, tmp_path / "copy")


def refused(folder: Path, capsys: Shown, *words: str, **changes: Any) -> str:
    """The one error line of a training that must not begin; nothing may be left behind."""
    code = main([*tinyrun.arguments(folder, training__max_train_steps=1, **changes), *words])
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert "please report it" not in err
    assert not (folder / "run" / "final").exists()
    return errors[0]


@pytest.mark.parametrize("spoil", damage.ALL, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_not_used(
    folder: Path, capsys: Shown, name: str, spoil: Callable[[Path], None]
) -> None:
    assert {path.name for path in (folder / "base").iterdir()} == set(FILES)
    spoil(folder / "base" / name)
    if (name, spoil.__name__) in UNTOLD:
        assert main([*tinyrun.arguments(folder), "--preflight"]) == 0
        return
    error = refused(folder, capsys)
    assert error.startswith("error: model_name: ")
    assert name in error or (name == "tokenizer.json" and "no tokenizer" in error)


def sharded(folder: Path) -> Path:
    """The base in two shards with an index."""
    base = folder / "base"
    tensors = load_file(base / SINGLE)
    names = sorted(tensors)
    homes = {name: f"model-{1 + (index % 2)}.safetensors" for index, name in enumerate(names)}
    for file in set(homes.values()):
        part = {name: tensors[name] for name in names if homes[name] == file}
        save_file(part, base / file, metadata={"format": "pt"})
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}), encoding="utf-8")
    (base / SINGLE).unlink()
    return base


def rewritten(base: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Let ``change`` edit the index's weight_map, or give back another."""
    index = json.loads((base / INDEX).read_text(encoding="utf-8"))
    result = change(index["weight_map"])
    index["weight_map"] = index["weight_map"] if result is None else result
    (base / INDEX).write_text(json.dumps(index), encoding="utf-8")


def test_two_shards_train_as_one_file_does(folder: Path) -> None:
    sharded(folder)
    assert main([*tinyrun.arguments(folder), "--preflight"]) == 0


@pytest.mark.parametrize("spoil", damage.ALL, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", [INDEX, "model-2.safetensors"])
def test_a_damaged_index_or_shard_is_named(
    folder: Path, capsys: Shown, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(sharded(folder) / name)
    if name != INDEX and spoil.__name__ in ("middle_bit_flipped", "last_bit_flipped"):
        return  # another number
    error = refused(folder, capsys)
    assert name in error


@pytest.mark.parametrize(
    "home",
    [
        "../secret.safetensors", "/etc/passwd", "sub/model-1.safetensors", "..", "", "model-9.safetensors", "a\\b",
        "config.json",
    ],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_folder_nor_to_what_is_not_there(
    folder: Path, capsys: Shown, home: str
) -> None:
    base = sharded(folder)
    (folder / "secret.safetensors").write_bytes((base / "model-1.safetensors").read_bytes())
    (base / "sub").mkdir()
    (base / "sub" / "model-1.safetensors").write_bytes((base / "model-1.safetensors").read_bytes())
    rewritten(base, lambda homes: homes.update({"model.norm.weight": home}))
    error = refused(folder, capsys)
    assert INDEX in error
    assert "does not lie beside it" in error or "is not there" in error or "is no safetensors" in error


@pytest.mark.parametrize("homes", [None, [], {}, {"a": 3}, "text"])
def test_an_index_without_a_map_is_named(folder: Path, capsys: Shown, homes: Any) -> None:
    base = sharded(folder)
    (base / INDEX).write_text(json.dumps({"weight_map": homes}), encoding="utf-8")
    assert f"{INDEX} has no weight_map" in refused(folder, capsys)


def test_a_tensor_that_the_index_promises_and_the_shard_lacks(folder: Path, capsys: Shown) -> None:
    base = sharded(folder)
    rewritten(
        base, lambda homes: homes.update({"model.norm.weight": "model-1.safetensors", "more": "model-1.safetensors"})
    )
    assert "does not hold" in refused(folder, capsys)


@pytest.fixture
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The base's tensors; what a test makes of them is written by ``keep``."""
    return load_file(folder / "base" / SINGLE)


def keep(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "base" / SINGLE, {"format": "pt"}
    )


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor(folder: Path, capsys: Shown, tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME]
    keep(folder, tensors)
    assert f"1 tensors are missing and 0 have another shape, {NAME} first" in refused(folder, capsys)


def test_an_extra_tensor_is_said(folder: Path, capsys: Shown, tensors: dict[str, torch.Tensor]) -> None:
    keep(folder, tensors | {"model.layers.1.mlp.surprise.weight": torch.ones(2)})
    assert main([*tinyrun.arguments(folder), "--preflight"]) == 0
    said = "1 tensors have no place in the model and are left out, model.layers.1.mlp.surprise.weight first"
    assert said in capsys.readouterr().err


def test_a_tensor_name_cannot_steer_the_terminal(folder: Path, capsys: Shown, tensors: dict[str, torch.Tensor]) -> None:
    keep(folder, tensors | {"\x1b[2Jgone": torch.ones(2)})
    assert main([*tinyrun.arguments(folder), "--preflight"]) == 0
    shown = capsys.readouterr()
    assert "\\x1b[2Jgone" in shown.err
    assert "\x1b" not in shown.err + shown.out


def test_a_tensor_of_another_shape(folder: Path, capsys: Shown, tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME][:-1]
    keep(folder, tensors)
    assert f"0 tensors are missing and 1 have another shape, {NAME} first" in refused(folder, capsys)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_a_tensor_of_a_type_that_is_no_weight(
    folder: Path, capsys: Shown, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    tensors[NAME] = tensors[NAME].to(dtype)
    keep(folder, tensors)
    error = refused(folder, capsys)
    assert f"holds {NAME} as" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite(
    folder: Path, capsys: Shown, tensors: dict[str, torch.Tensor], value: float, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors[NAME][3, 5] = value
    keep(folder, tensors)
    assert f"1 tensors hold NaN or infinity, {NAME} first" in refused(folder, capsys)


def test_numbers_whose_sum_overflows_are_finite_all_the_same() -> None:
    from eulerforge.models.soundness import refuse_not_finite

    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, 3e38)
    refuse_not_finite(model, "big")


@pytest.mark.parametrize("length", [0, 7, 2**40, 2**63])
def test_a_header_that_lies_about_its_length(folder: Path, capsys: Shown, length: int) -> None:
    path = folder / "base" / SINGLE
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert SINGLE in refused(folder, capsys)


def test_a_tokenizer_whose_ids_the_embedding_does_not_hold(folder: Path, capsys: Shown) -> None:
    rows = len(tiny.tiny_tokenizer())
    tiny.tiny_model("llama", vocab_size=rows - 20).save_pretrained(folder / "base")
    error = refused(folder, capsys)
    assert "tokenizer and model do not belong together" in error
    assert f"the embedding has {rows - 20} rows" in error


def test_ids_that_no_row_uses_are_a_warning(folder: Path, capsys: Shown) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder / "base")
    tiny.tiny_model("llama", vocab_size=len(tokenizer) - 1).save_pretrained(folder / "base")
    assert main([*tinyrun.arguments(folder), "--preflight"]) == 0
    assert "knows 1 tokens that the model's embedding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "key"),
    [("config.json", "model_name.config"), (SINGLE, "model_name"), ("chat_template.jinja", "data")],
)
def test_what_nothing_can_tell_at_the_first_start_is_refused_by_a_resume(
    folder: Path, capsys: Shown, changed: str, key: str
) -> None:
    words = tinyrun.arguments(folder, training__save_steps=1, training__max_train_steps=2)
    assert main(words) == 0
    manifest = folder / "run" / "final" / "manifest.json"
    manifest.unlink()  # the run is not finished any more
    path = folder / "base" / changed
    if changed == "config.json":
        config = json.loads(path.read_text(encoding="utf-8"))
        config["rope_parameters"]["rope_theta"] = 12345.0
        path.write_text(json.dumps(config), encoding="utf-8")
    elif changed == SINGLE:
        damage.last_bit_flipped(path)
    else:
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>\n", "<|im_end|>"), encoding="utf-8")
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    assert f"error: {key}: was " in capsys.readouterr().err
    if key.startswith("model_name"):
        assert main(["merge", str(folder / "run" / "checkpoint-2")]) == 2
        assert f"error: {key}: " in capsys.readouterr().err


def test_a_config_that_only_another_transformers_wrote_is_the_same(folder: Path) -> None:
    from eulerforge.training.receipt import config_sha256

    path = folder / "base" / "config.json"
    before = config_sha256(folder / "base")
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "9"}), encoding="utf-8")
    assert config_sha256(folder / "base") == before
