"""The collector rests during the imports of a start, and only there."""

from __future__ import annotations

import gc
import sys

import pytest

from eulerforge.cli.collector import uncollected_imports


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process that has not imported torch; the freezing is noted instead of done."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    frozen: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append("frozen"))
    return frozen


def test_it_rests_during_the_imports(fresh: list[str]) -> None:
    with uncollected_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert fresh == ["frozen"]


def test_an_import_that_fails_leaves_it_working(fresh: list[str]) -> None:
    with pytest.raises(ImportError), uncollected_imports():
        raise ImportError
    assert gc.isenabled()
    assert fresh == ["frozen"]


def test_in_somebody_elses_process_nothing_is_changed(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with uncollected_imports():
        assert gc.isenabled()
    assert fresh == []


def test_a_collector_that_was_switched_off_stays_off(fresh: list[str]) -> None:
    gc.disable()
    try:
        with uncollected_imports():
            pass
        assert not gc.isenabled()
        assert fresh == []
    finally:
        gc.enable()
