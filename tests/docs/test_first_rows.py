"""The first tutorial's own rows and preset train as they stand, with a tiny model in the place of its real one."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest
import tiny

from eulerforge.cli.main import main

PAGE = pages.ROOT / "docs" / "tutorials" / "first_fine_tune.md"


def test_the_rows_and_the_preset_of_the_page_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = pages.blocks(PAGE)
    rows = next(block.text for block in blocks if block.language == "json" and '"prompt"' in block.text)
    preset = next(block.text for block in blocks if block.language == "toml" and "faq.jsonl" in block.text)
    tiny.save_tiny(tmp_path / "base")
    (tmp_path / "faq.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "faq.toml").write_text(preset, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = ["train", "--preset", "faq.toml", "--set", "model_name=base", "--set", "training.max_train_steps=2"]
    assert main(words) == 0
    assert "training: 1 rows" in capsys.readouterr().err
    assert (tmp_path / "runs" / "faq" / "final" / "adapter.safetensors").exists()
