"""Every key of the schema, broken in every way that we know: refused in one line with file, line, key and hint.

A preset with all keys passes; of the mutations none may pass, show a traceback, or be told of the wrong line.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import presetforge
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eulerforge.cli.main import main
from eulerforge.plugins import load_registry

ENOUGH = 400
REGISTRY = load_registry()


@pytest.fixture(autouse=True)
def _one_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan for plugins is not under attack here: done once, not a thousand times."""
    monkeypatch.setattr("eulerforge.plugins.load_registry", lambda **_: REGISTRY)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return str(tmp_path / "rows.jsonl")


def check(path: Path) -> int:
    return main(["train", "--preset", str(path), "--validate-only"])


@pytest.mark.parametrize("form", presetforge.FORMATS)
def test_a_preset_with_every_key_passes(
    tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    path = tmp_path / f"all.{form}"
    path.write_text(presetforge.write(presetforge.valid_tree(rows), form)[0], encoding="utf-8")
    assert check(path) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", presetforge.FORMATS)
def test_every_single_mutation_is_refused_in_one_line_with_file_line_and_key(
    tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    tree = presetforge.valid_tree(rows)
    path = tmp_path / f"broken.{form}"
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    for number, mutation in enumerate(presetforge.mutations(tree)):
        if mutation.kind == "null" and form == "toml":
            continue  # TOML has no null
        if form == "yml" and number % 2 and mutation.kind not in ("null", "missing"):
            continue  # PyYAML takes its time; what comes after the reader is the same
        text, lines = presetforge.write(mutation.tree, form, mutation.key if mutation.twice else "")
        path.write_text(text, encoding="utf-8")
        code = check(path)
        shown = capsys.readouterr()
        kinds[mutation.kind] += 1
        fault = _fault(shown.err, code, str(path), mutation, lines)
        if fault or shown.out:
            wrong.append(f"{mutation}: {fault}: exit {code}: {shown.err or shown.out}")
    assert not wrong, f"{len(wrong)} of {kinds.total()}\n" + "\n".join(wrong[:30])
    assert kinds.total() >= ENOUGH, kinds
    assert min(kinds[kind] for kind in ("misspelt", "wrong type", "out of range", "no choice", "twice", "missing")) >= 3


def _fault(err: str, code: int, path: str, mutation: presetforge.Mutation, lines: dict[str, int]) -> str:
    """What is wrong with what was said of a mutation; empty when all is well."""
    said = err.splitlines()
    if code not in (2, 3):
        return "the exit code"
    if "Traceback" in err or "please report it" in err:
        return "a traceback"
    if len(said) != 2 or not said[0].startswith("error: ") or not re.match(r"hint: \S", said[1]):
        return "not one error line and one hint"
    near = mutation.key
    while near and near not in lines:
        near = near.rpartition(".")[0]
    expected = f"error: {path}:{lines.get(near, 1)}: "
    if not said[0].startswith(expected):
        return f"it does not begin with {expected}"
    key, _, message = said[0].removeprefix(expected).partition(": ")
    inside = key == mutation.key or key.startswith(mutation.key + ".") or mutation.key.startswith(key + ".")
    if not message or not inside:
        return f"it does not name {mutation.key}"
    return ""


slips = st.tuples(st.integers(0, 10**6), st.sampled_from(list("\"'[]{}=:#,\n\t -&*!|>%@`\\0a\x00\x1b\u2028é")))


@pytest.mark.parametrize("form", presetforge.FORMATS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=st.lists(slips, min_size=1, max_size=4), cut=st.none() | st.integers(0, 10**6))
def test_no_edit_of_a_text_shows_anything_but_lines_of_ours(
    tmp_path: Path,
    rows: str,
    capsys: pytest.CaptureFixture[str],
    form: str,
    edits: list[tuple[int, str]],
    cut: int | None,
) -> None:
    text = presetforge.write(presetforge.valid_tree(rows), form)[0]
    for place, letter in edits:
        at = place % len(text)
        text = text[:at] + letter + text[at + place % 2 :]
    text = text if cut is None else text[: cut % len(text)]
    path = tmp_path / f"edited.{form}"
    path.write_text(text, encoding="utf-8")
    code = check(path)
    shown = capsys.readouterr()
    assert code in (0, 2, 3)
    for line in shown.err.splitlines():
        assert line.startswith(("error: ", "hint: ", "warning: "))
        assert line.isprintable()
    if code:
        assert str(path) in shown.err


PROPER = {
    "seed": st.integers(0, 2**63 - 1),
    "training.lr": st.floats(1e-12, 1e3),
    "training.weight_decay": st.floats(0, 10),
    "training.min_lr_ratio": st.floats(0, 1),
    "training.batch_size": st.integers(1, 10**9),
    "training.scheduler": st.sampled_from(["cosine", "linear", "constant"]),
    "data.max_length": st.integers(2, 10**9),
    "data.packing": st.sampled_from(["flat", "bins", "off"]),
    "data.system_prompt": st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp", "Cf"))),
    "injection.lora_r": st.integers(1, 4096),
    "injection.lora_alpha": st.floats(1e-6, 1e6),
    "injection.lora_dropout": st.floats(0, 0.99),
    "injection.use_rslora": st.booleans(),
}  # fmt: skip


@pytest.mark.parametrize("form", presetforge.FORMATS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.fixed_dictionaries({}, optional=PROPER))
def test_proper_values_pass_and_are_what_was_written(
    tmp_path: Path, rows: str, form: str, values: dict[str, object]
) -> None:
    from eulerforge.config import load_run_config
    from eulerforge.config.structure import as_tree

    tree = presetforge.valid_tree(rows)
    for key, value in values.items():
        presetforge.put(tree, key, value)
    path = tmp_path / f"proper.{form}"
    path.write_text(presetforge.write(tree, form)[0], encoding="utf-8")
    run = load_run_config(str(path), [], strategy_configs=REGISTRY.strategy_config).run
    for key, value in values.items():
        node: object = as_tree(run)
        for part in key.split("."):
            assert isinstance(node, dict)
            node = node[part]
        assert node == value
