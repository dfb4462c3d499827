"""metrics.jsonl: appended row by row, cut back to the step that a run goes on from."""

from __future__ import annotations

import json
from pathlib import Path

from eulerforge.training.metrics import FILE_NAME, MetricsLog, read_metrics


def write(folder: Path, *steps: int, start: int = 0) -> None:
    with MetricsLog(folder, step=start) as log:
        for step in steps:
            log.write({"step": step, "loss": step / 3})


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": 0.1})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]
        log.write({"step": 2, "loss": 0.2})
        log.sync()
        assert (tmp_path / FILE_NAME).read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n'


def test_a_resumed_run_drops_the_rows_that_it_trains_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, start=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path)[1]["loss"] == 2 / 3


def test_the_last_measure_is_not_written_twice(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for row in ({"step": 1, "held_out_loss": 3.0}, {"step": 2, "loss": 1.0}, {"step": 2, "held_out_loss": 2.0}):
            log.write(row)
    with MetricsLog(tmp_path, step=2):
        assert len(read_metrics(tmp_path)) == 3, "a validation in the middle of a run is kept"
    with MetricsLog(tmp_path, step=2, measured_again=True):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
        assert "loss" in read_metrics(tmp_path)[1]


def test_a_run_that_begins_at_step_0_begins_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path)
    assert read_metrics(tmp_path) == []
    assert (tmp_path / FILE_NAME).exists()


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0})[:9])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 3, start=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_damaged_lines_are_left_out_said_and_no_later_row_with_them(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    lines = (tmp_path / FILE_NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE_NAME).write_bytes(lines[0] + b"\xff{\n" + lines[1] + b'{"loss": 1}\n' + lines[2] + b'{"st')
    said: list[str] = []
    assert [row["step"] for row in read_metrics(tmp_path, say=said.append)] == [1, 2, 3]
    assert said == [f"warning: {tmp_path / FILE_NAME} line 2 is damaged, 2 in all: such rows are left out"]
    with MetricsLog(tmp_path, step=2, say=said.append):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert len(said) == 2


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """NaN is not JSON; a file of an earlier version that holds one is mended when it is cut."""
    (tmp_path / FILE_NAME).write_text('{"step": 1, "loss": 1.5}\n{"step": 1, "held_out_loss": NaN}\n')
    with MetricsLog(tmp_path, step=1) as log:
        log.write({"step": 2, "loss": 1.0, "rates": (float("inf"), 2.0)})
    assert read_metrics(tmp_path)[1:] == [
        {"step": 1, "held_out_loss": None},
        {"step": 2, "loss": 1.0, "rates": [None, 2.0]},
    ]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
