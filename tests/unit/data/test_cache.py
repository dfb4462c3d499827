"""The token cache: hit when nothing changed, made again when anything did or an entry is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from eulerforge.data.cache import tokenizer_sha256
from eulerforge.data.prepared import Datasets, build_dataset

ROWS = [{"prompt": f"question {number}\n", "response": "answer"} for number in range(8)]


@pytest.fixture
def build(write_rows: Callable[..., str], tmp_path: Path, plain: Any, data_config: Any) -> Callable[..., Datasets]:
    def run(tokenizer: Any = plain, rows: Any = ROWS, **keys: Any) -> Datasets:
        config = data_config(**({"path": (write_rows(rows),), "cache": True} | keys))
        return build_dataset(config, tokenizer, cache_dir=tmp_path / "cache")

    return run


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "data").iterdir())


def test_a_hit_gives_the_same_rows_and_report(build: Callable[..., Datasets], tmp_path: Path) -> None:
    first, second = build(max_length=5), build(max_length=5)
    assert (first.report.cache, second.report.cache) == ("built", "hit")
    assert first.train.sha256 == second.train.sha256
    assert first.report.parts == second.report.parts
    assert first.train.source(3) == second.train.source(3)
    assert not second.train.tokens.flags.writeable
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 6},
        {"on_long": "drop"},
        {"template": "none"},
        {"system_prompt": "be brief"},
        {"schema": {"prompt": "prompt"}},
        {"max_rows": 5},
        {"rows": ROWS[:-1]},
    ],
)
def test_any_change_makes_another_entry(build: Callable[..., Datasets], change: dict[str, Any]) -> None:
    build()
    assert build(**change).report.cache == "built"
    assert build().report.cache == "hit"


def test_another_tokenizer_or_template_makes_another_entry(
    build: Callable[..., Datasets], chatml: Any, reasoning: Any, plain_bos: Any
) -> None:
    for tokenizer in (chatml, reasoning, plain_bos):
        assert build(tokenizer).report.cache == "built"
        assert build(tokenizer).report.cache == "hit"


def test_using_the_tokenizer_does_not_change_its_key(build: Callable[..., Datasets], chatml: Any) -> None:
    build(chatml)
    chatml(["a", "a b c d e f"], padding=True, truncation=True, max_length=2)
    assert build(chatml).report.cache == "hit"


def test_the_key_is_the_same_in_every_process_and_the_tokenizer_comes_back_as_it_was(llama3: Any, chatml: Any) -> None:
    backend = llama3.backend_tokenizer
    key, copy = tokenizer_sha256(llama3), PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()))
    backend.enable_truncation(5, stride=1, strategy="only_first", direction="left")
    backend.enable_padding(direction="left", pad_id=3, pad_type_id=1, pad_token="x", length=9, pad_to_multiple_of=8)
    left = backend.truncation, backend.padding
    try:
        assert tokenizer_sha256(llama3) == key != tokenizer_sha256(chatml)
        assert (backend.truncation, backend.padding) == left
    finally:
        backend.no_truncation()
        backend.no_padding()
    # maps of another object lie in another order in memory
    copy.chat_template, copy.bos_token, copy.eos_token = llama3.chat_template, llama3.bos_token, llama3.eos_token
    assert tokenizer_sha256(copy) == key


def test_split_settings_share_an_entry(build: Callable[..., Datasets]) -> None:
    build(validation={"size": 2})
    data = build(validation={"fraction": 0.5, "seed": 3})
    assert data.report.cache == "hit"
    assert len(data.train) == 4


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def lie(path: Path) -> None:
    manifest = json.loads((path.parent / "entry.json").read_text())
    del manifest["files"][path.stem]
    (path.parent / "entry.json").write_text(json.dumps(manifest))


def no_manifest(path: Path) -> None:
    (path.parent / "entry.json").write_text("{")


@pytest.mark.parametrize("damage", [flip, shorten, lie, no_manifest, Path.unlink])
@pytest.mark.parametrize("name", ["tokens", "labelled", "offsets"])
def test_a_damaged_entry_is_said_and_made_again(
    build: Callable[..., Datasets], tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    whole = build().train.sha256
    (entry,) = entries(tmp_path)
    damage(entry / f"{name}.npy")
    data = build()
    assert data.train.sha256 == whole
    assert data.report.cache == "built"
    assert "damaged" in data.report.notes[0]
    assert build().report.cache == "hit"
    assert entries(tmp_path) == [entry], "nothing is left beside the entry"


def test_a_folder_that_cannot_be_written_is_said(
    write_rows: Callable[..., str], tmp_path: Path, plain: Any, data_config: Any
) -> None:
    (tmp_path / "file").write_text("not a folder")
    config = data_config(path=(write_rows(ROWS),), cache=True)
    data = build_dataset(config, plain, cache_dir=tmp_path / "file")
    assert len(data.train) == 8
    assert data.report.cache == "off"
    assert "could not be cached" in data.report.notes[0]


def test_the_default_folder(
    write_rows: Callable[..., str], tmp_path: Path, plain: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EULERFORGE_CACHE", str(tmp_path / "own"))
    build_dataset(data_config(path=(write_rows(ROWS),), cache=True), plain)
    assert len(list((tmp_path / "own" / "data").iterdir())) == 1


def test_no_cache(build: Callable[..., Datasets], tmp_path: Path) -> None:
    assert build(cache=False).report.cache == "off"
    assert not (tmp_path / "cache").exists()
