"""``eulerforge plugins``: what is printed, and the exit codes."""

from __future__ import annotations

import json

import pytest

from eulerforge.cli.main import main


@pytest.fixture
def run(shop, monkeypatch, capsys):
    """Run the command on the shop's plugins: (exit code, stdout, stderr)."""
    monkeypatch.setattr("eulerforge.plugins.discovery.installed_entry_points", lambda: shop.entry_points)

    def call(*arguments: str):
        code = main(["plugins", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_list(shop, run):
    shop.strategy("good")
    shop.plugin("bad", "raise RuntimeError('deep')")
    code, out, err = run("list")
    head, bad, good = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split() == ["NAME", "KIND", "OFFERS", "VERSION", "DISTRIBUTION", "STATUS", "REASON"]
    assert bad.split()[:4] == ["bad", "1.2.3", "dist-bad", "broken"]
    assert "RuntimeError while loading: deep" in bad
    assert good.split() == ["good", "strategy", "good", "1.2.3", "dist-good", "ok"]


def test_list_as_json(shop, run):
    shop.strategy("good")
    code, out, _ = run("list", "--json")
    (row,) = json.loads(out)["data"]["plugins"]
    assert code == 0
    assert row["offers"] == [{"kind": "strategy", "name": "good", "aliases": []}]
    assert row["status"] == "ok"


def test_strict_is_exit_3_and_still_lists(shop, run):
    shop.plugin("bad", "raise RuntimeError('deep')")
    code, out, _ = run("list", "--strict-plugins")
    assert code == 3
    assert "broken" in out
    assert run("list", "--strict-plugins", "--no-plugin", "bad")[0] == 0


def test_a_name_that_blocks_nothing_warns(shop, run):
    shop.strategy("good")
    code, _, err = run("list", "--no-plugin", "god")
    assert code == 0
    assert err.splitlines() == [
        "warning: --no-plugin: no installed plugin is called 'god'",
        "hint: did you mean 'good'?",
    ]


def test_no_plugins(run):
    code, out, err = run("list")
    assert (code, out) == (0, "")
    assert "no plugin is installed" in err


@pytest.mark.parametrize("name", ["entry", "dist-entry", "dist-entry:entry", "offered", "dist-entry:offered", "uno"])
def test_show_finds_a_plugin_by_each_of_its_names(shop, run, name):
    shop.strategy("entry", offers="offered", extra=", aliases=('uno',)")
    code, out, _ = run("show", name)
    assert code == 0
    assert "entry: ok" in out
    assert "strategy offered: s" in out
    (row,) = [line for line in out.splitlines() if line.startswith("injection.scale")]
    assert row.split() == ["injection.scale", "float", "1.0", "the", "scale"]


def test_show_as_json_has_every_key(shop, run):
    shop.strategy("good")
    (plugin,) = json.loads(run("show", "good", "--json")[1])["data"]["plugins"]
    keys = {key["name"]: key for key in plugin["offers"][0]["keys"]}
    assert keys["injection.match"]["choices"] == ["role", "exact"]
    assert all(key["help"] and key["type"] for key in keys.values())


def test_show_of_an_unknown_name(shop, run):
    shop.strategy("good")
    code, out, err = run("show", "goood")
    assert (code, out) == (3, "")
    assert err.splitlines() == ["error: there is no plugin 'goood'", "hint: did you mean 'good'?"]


def test_show_survives_a_config_class_that_is_not_there(shop, run):
    shop.plugin(
        "one",
        """
        @hookimpl
        def eulerforge_strategies():
            return [StrategySpec(name="one", target="shop_nowhere:X", config_target="shop_nowhere:Y", summary="s")]
        """,
    )
    code, out, _ = run("show", "one")
    assert code == 0
    assert "No module named 'shop_nowhere'" in out


def test_check(shop, run):
    shop.strategy("good")
    shop.plugin("bad", "raise RuntimeError('deep')")
    code, out, _ = run("check", "good")
    assert code == 0
    assert "failed" not in out
    code, out, _ = run("check", "bad", "--json")
    data = json.loads(out)["data"]
    assert (code, data["passed"]) == (3, False)
    assert {"name": "load", "status": "failed", "reason": "RuntimeError while loading: deep"} in data["plugins"][0][
        "checks"
    ]
