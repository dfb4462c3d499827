"""Which file holds which tensor, and what a copy of a base folder takes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eulerforge.errors import ModelError
from eulerforge.export.basefiles import candidates, other_files, read_base_files


def shards(folder: Path, **files: list[str]) -> None:
    """A folder with an index: file stem -> tensor names."""
    weight_map = {}
    for stem, names in files.items():
        save_file({name: torch.zeros(2) for name in names}, folder / f"{stem}.safetensors")
        weight_map |= dict.fromkeys(names, f"{stem}.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_file_and_several_shards_are_read_alike(tmp_path: Path) -> None:
    single, several = tmp_path / "single", tmp_path / "several"
    single.mkdir()
    several.mkdir()
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, single / "model.safetensors")
    shards(several, one=["a"], two=["b"])
    assert read_base_files(single).shards == {"a": "model.safetensors", "b": "model.safetensors"}
    assert read_base_files(several).shards == {"a": "one.safetensors", "b": "two.safetensors"}
    assert read_base_files(several).files == ("one.safetensors", "two.safetensors")


def test_the_index_is_held_against_the_files(tmp_path: Path) -> None:
    shards(tmp_path, one=["a"], two=["b"])
    save_file({"other": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match=r"two\.safetensors does not hold b"):
        read_base_files(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two\.safetensors, which is not there"):
        read_base_files(tmp_path)


def test_an_index_may_not_point_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ModelError, match="does not lie beside it"):
        read_base_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="no index"):
        read_base_files(tmp_path)


def test_a_damaged_shard_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    with pytest.raises(ModelError, match="damaged"):
        read_base_files(tmp_path)


def test_pickle_files_are_named_in_the_hint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        read_base_files(tmp_path)
    assert "pickle" in str(caught.value.problems[0].hint)


def test_a_copy_takes_no_second_form_of_the_weights(tmp_path: Path) -> None:
    kept = ["config.json", "LICENSE", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    left = [
        "model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/x.pth",
        "q4.gguf",
        ".git/HEAD",
    ]
    left += ["model.safetensors.index.json", "pytorch_model.bin.index.json", "onnx/model.onnx"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(map(str, other_files(tmp_path))) == sorted(kept)


def test_the_same_name_is_tried_before_any_other() -> None:
    names = list(candidates("model.layers.0.mlp.gate_proj.weight"))
    assert names[0] == "model.layers.0.mlp.gate_proj.weight"
    assert "model.language_model.layers.0.mlp.gate_proj.weight" in names
    assert len(set(names)) == len(names)


def test_a_name_in_another_prefix_is_found_and_an_absent_one_named(tmp_path: Path) -> None:
    save_file({"model.language_model.layers.0.q.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    base = read_base_files(tmp_path)
    assert base.name_of("model.layers.0.q.weight") == "model.language_model.layers.0.q.weight"
    with pytest.raises(ModelError, match=r"model\.layers\.9\.q\.weight"):
        base.name_of("model.layers.9.q.weight")
    with pytest.raises(ModelError) as caught:
        base.name_of("lm_head.weight")
    assert "tied" in str(caught.value.problems[0].hint)
