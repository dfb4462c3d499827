"""Finding plugins, and blocking them before they are imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eulerforge.plugins import load_registry
from eulerforge.plugins.discovery import canonical, installed_entry_points


def names(registry):
    return [(record.name, record.distribution, record.status) for record in registry.records]


def test_the_same_entry_of_one_distribution_counts_once(shop):
    shop.strategy("one", distribution="My_Dist")
    shop.strategy("one", distribution="my-dist")
    assert names(shop.registry()) == [("one", "My_Dist", "ok")]


def test_two_distributions_may_use_one_entry_name(shop):
    shop.strategy("one", distribution="a", offers="first")
    shop.strategy("one", distribution="b", offers="second")
    assert names(shop.registry()) == [("one", "a", "ok"), ("one", "b", "ok")]


@pytest.mark.parametrize("name", ["loud", "dist-loud", "Dist_Loud", "dist-loud:loud"])
@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_blocked_plugin_is_never_imported(shop, name, how):
    shop.plugin("loud", "raise RuntimeError('imported')")
    shop.strategy("quiet")
    if how == "option":
        registry = shop.registry(disable=[name])
    else:
        registry = shop.registry(environ={"EULERFORGE_DISABLE_PLUGINS": f" {name} , quiet"})
    loud, quiet = registry.records
    assert loud.status == "disabled"
    assert loud.reason == (
        "switched off by --no-plugin" if how == "option" else "switched off by EULERFORGE_DISABLE_PLUGINS"
    )
    assert loud.module not in sys.modules
    assert quiet.status == ("ok" if how == "option" else "disabled")
    assert not registry.warnings


def test_only_these(shop):
    shop.strategy("one")
    shop.strategy("two")
    registry = shop.registry(environ={"EULERFORGE_PLUGINS": "two"})
    assert [status for _, _, status in names(registry)] == ["disabled", "ok"]
    assert "EULERFORGE_PLUGINS" in registry.records[0].reason


def test_empty_variables_count_as_not_set(shop):
    shop.strategy("one")
    assert names(shop.registry(environ={"EULERFORGE_PLUGINS": "", "EULERFORGE_DISABLE_PLUGINS": ""})) == [
        ("one", "dist-one", "ok")
    ]


def test_a_name_that_blocks_nothing_warns_with_the_nearest(shop):
    shop.strategy("dense")
    registry = shop.registry(disable=["dnse"], environ={"EULERFORGE_PLUGINS": "dense,zzzzzz"})
    first, second = registry.warnings
    assert (first.message, first.source, first.hint) == (
        "no installed plugin is called 'dnse'",
        "--no-plugin",
        "did you mean 'dense'?",
    )
    assert second.source == "EULERFORGE_PLUGINS"
    assert "plugins list" in second.hint


def test_canonical_spelling():
    assert canonical("My_Dist:Entry.One") == "my-dist:entry-one"


def test_damaged_metadata_of_a_foreign_package_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in (
        ("broken_meta", "[eulerforge.plugins]\nthis line has no equals sign\n"),
        ("good_meta", "[eulerforge.plugins]\nabsent = shop_absent_module\n"),
    ):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert [entry.name for entry in installed_entry_points()] == ["absent"]
    (record,) = load_registry(environ={}).records
    assert (record.distribution, record.version, record.status) == ("good-meta", "1.0", "broken")
    assert "shop_absent_module" in record.reason
