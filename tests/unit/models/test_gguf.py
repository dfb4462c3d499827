"""A GGUF file without what reads it, and one that lacks tensors, are one line each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from eulerforge.errors import ModelError
from eulerforge.models.gguf import NEEDED, converted_folder


@pytest.mark.parametrize("absent", NEEDED)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == absent else find(name, *rest)

    monkeypatch.setattr("eulerforge.models.gguf.importlib.util.find_spec", without)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=f"reading model.gguf needs {absent}$") as caught:
        converted_folder(tmp_path / "model.gguf")
    assert caught.value.problems[0].hint == "pip install 'eulerforge-core[gguf]'"


def test_a_part_of_a_split_file_is_refused_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama of two layers whose file names the second and does not hold it."""
    gguf = pytest.importorskip("gguf", reason="writes a file with the package that reads it (extra gguf)")
    pytest.importorskip("accelerate", reason="transformers wants it for the conversion (extra gguf)")
    numpy = pytest.importorskip("numpy")
    monkeypatch.setenv("EULERFORGE_CACHE", str(tmp_path / "cache"))
    hidden, mlp, words = 32, 64, 16
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("a") + at) for at in range(words)])
    writer.add_token_merges(["a b"])
    shapes = {
        "token_embd": (words, hidden), "output_norm": (hidden,), "output": (words, hidden),
        "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,),
        **{f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (mlp, hidden), "blk.0.ffn_up": (mlp, hidden), "blk.0.ffn_down": (hidden, mlp),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.ones(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"part.gguf lacks 9 of the model's tensors, model.layers.1.") as caught:
        converted_folder(tmp_path / "part.gguf")
    assert "joined first" in str(caught.value.problems[0].hint)
    assert not list((tmp_path / "cache" / "models").iterdir())
