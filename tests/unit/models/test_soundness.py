"""A start looks at a model folder several times; each file is parsed once, and again when it has changed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eulerforge.config.schema import RunConfig
from eulerforge.errors import ModelError
from eulerforge.models import gguf, soundness
from eulerforge.models.load import load_tokenizer
from eulerforge.models.soundness import check_folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's JSON was parsed."""
    counted: Counter[str] = Counter()
    parse = soundness._json_object

    def noted(path: Path) -> dict[str, Any]:
        counted[path.name] += 1
        return parse(path)

    monkeypatch.setattr(soundness, "_json_object", noted)
    return counted


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files had lain there for a while."""
    monkeypatch.setattr("eulerforge.config.atomic._CLOCK_TICK_NS", -(10**18))
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


def test_a_file_is_parsed_once(tmp_path: Path, looks: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    settle(folder, monkeypatch)
    for _ in range(3):
        check_folder(folder, weights=False)
    assert looks["config.json"] == looks["tokenizer_config.json"] == 1
    assert looks["tokenizer.json"] == 0, "it is large, and read whole when it is loaded"


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '"text"', ""])
def test_a_damaged_tokenizer_is_named_when_it_is_loaded(tmp_path: Path, text: str) -> None:
    folder = save_tiny(tmp_path)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    check_folder(folder)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not|no tokenizer can be loaded from"):
        load_tokenizer(RunConfig(model_name=str(folder), injection=None))


def test_a_tokenizer_that_is_no_file_is_found_at_once(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "gone")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        check_folder(folder)


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    settle(folder, monkeypatch)
    check_folder(folder)
    path = folder / "generation_config.json"
    size = path.stat().st_size
    path.write_bytes(b"[" + b" " * (size - 2) + b"]")
    os.utime(path, ns=(1, 1))  # same size, same time of its content: the entry's own time tells
    with pytest.raises(ModelError, match=r"generation_config\.json is not a JSON object"):
        check_folder(folder)


def test_what_is_wrong_stays_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    settle(folder, monkeypatch)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"generation_config\.json is not valid JSON"):
            check_folder(folder)


def test_the_hash_of_a_gguf_file_follows_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    settle(tmp_path, monkeypatch)
    first = gguf._digest(path, gguf.file_state(path))
    assert gguf._digest(path, gguf.file_state(path)) == first
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert gguf._digest(path, gguf.file_state(path)) != first


class Words(PreTrainedTokenizerFast):
    """Counts how often the dictionary of the whole vocabulary is built."""

    dictionaries = 0

    def get_vocab(self) -> dict[str, int]:
        self.dictionaries += 1
        return super().get_vocab()


def words(**ids: int) -> Words:
    return Words(tokenizer_object=Tokenizer(WordLevel(ids, unk_token="a")))


def test_ids_without_a_gap_need_no_dictionary() -> None:
    tokenizer = words(a=0, b=1)
    tokenizer.add_tokens(["c"])
    tokenizer.dictionaries = 0
    assert soundness.refuse_ids_beyond(3, tokenizer, highest=2, name="base") is None
    assert tokenizer.dictionaries == 0
    assert "knows 1 tokens" in (soundness.refuse_ids_beyond(2, tokenizer, highest=1, name="base") or "")
    with pytest.raises(ModelError, match=r"holds the id 2 \('c'\)"):
        soundness.refuse_ids_beyond(2, tokenizer, highest=2, name="base")


@pytest.mark.parametrize("ids", [{"a": 0, "b": 5}, {"a": 5, "b": 6}, {"a": 0, "b": 0, "c": 2}])
def test_an_id_behind_a_gap_is_found(ids: dict[str, int]) -> None:
    tokenizer, top = words(**ids), max(ids.values())
    assert soundness.refuse_ids_beyond(top + 1, tokenizer, highest=top, name="base") is None
    for rows in range(1, top + 1):
        assert soundness.refuse_ids_beyond(rows, tokenizer, highest=None, name="base") is not None


@pytest.mark.parametrize("shape", [(), (3,), (1000, 70), (5, 40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found_in_any_piece(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(soundness, "PIECE_NUMBERS", 1000)
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.full(shape, 1e38, dtype=dtype))})
    soundness.refuse_not_finite(model, "big numbers, whose sum overflows")
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            model["w"].reshape(-1)[-1:] = value
        with pytest.raises(ModelError, match="hold NaN or infinity, w first"):
            soundness.refuse_not_finite(model, "broken")


def test_looking_at_a_large_bf16_weight_takes_no_copy_of_it() -> None:
    from eulerforge.training.memory import peak_bytes

    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(100_000, 600, dtype=torch.bfloat16))})
    model["w"].data.fill_(1.0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = peak_bytes(torch.device("cpu"))
    soundness.refuse_not_finite(model, "large")
    assert peak_bytes(torch.device("cpu")) - before < 60 << 20  # its fp32 copy would be 240 MB
