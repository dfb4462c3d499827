"""``plugins check``: each row fails for its own reason and only for that."""

from __future__ import annotations

import pytest

from eulerforge.plugins.checks import check_plugin
from eulerforge.plugins.describe import describe_keys, type_text


def rows(shop, **options):
    registry = shop.registry(**options)
    return {row.name: (row.status, row.reason) for row in check_plugin(registry, registry.records[0])}


def strategy(target: str = "shop_target:Strategy", config: str = "shop_config:Config", summary: str = "s") -> str:
    return f"""
    @hookimpl
    def eulerforge_strategies():
        return [StrategySpec(name="one", target="{target}", config_target="{config}", summary="{summary}",
                             groups=("lora",))]
    """


def test_a_good_plugin_passes_every_check(shop):
    shop.plugin("one", strategy())
    assert rows(shop) == {
        "light import": ("ok", ""),
        "load": ("ok", "API 1.0"),
        "names": ("ok", ""),
        "strategy one: fields": ("ok", ""),
        "strategy one: target": ("ok", ""),
        "strategy one: protocol": ("ok", ""),
        "strategy one: config": ("ok", ""),
    }


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (strategy(target="shop_target:Absent"), "target", "has no attribute"),
        (
            strategy(target="shop_target:Short"),
            "protocol",
            "inject(model) cannot be called as inject(model, adapter, config, context)",
        ),
        (strategy(target="shop_target:Resolver"), "protocol", "has no method inject"),
        (strategy(config="shop_config:NoAttrs"), "config", "extends InjectionConfig"),
        (strategy(config="shop_config:Silent"), "config", "no help text: scale"),
        (strategy(summary=""), "fields", "summary is empty"),
    ],
)
def test_one_fault_fails_one_row(shop, source, row, reason):
    shop.plugin("one", source)
    failures = {name: why for name, (status, why) in rows(shop).items() if status == "failed"}
    assert list(failures) == [f"strategy one: {row}"]
    assert reason in failures[f"strategy one: {row}"]


def test_other_kinds(shop):
    shop.plugin(
        "one",
        """
        @hookimpl
        def eulerforge_backbones():
            return [BackboneSpec(name="b", target="shop_target:Backbone", summary="s", model_types=("llama",)),
                    BackboneSpec(name="gathers", target="shop_target:Backbone", summary="s", model_types=("llama",),
                                 isolation="gather"),
                    BackboneSpec(name="none", target="shop_target:Strategy", summary="s", model_types=())]
        @hookimpl
        def eulerforge_phase_groups():
            return [PhaseGroupSpec(name="g", target="shop_target:Resolver", summary="s", groups=("lora",))]
        @hookimpl
        def eulerforge_presets():
            return [PresetSpec(name="there", package="eulerforge", file="errors.py", summary="s"),
                    PresetSpec(name="gone", package="eulerforge", file="gone.toml", summary="s"),
                    PresetSpec(name="lost", package="shop_nowhere", file="gone.toml", summary="s")]
        """,
    )
    found = rows(shop)
    failures = {name: why for name, (status, why) in found.items() if status == "failed"}
    assert (
        found["backbone b: protocol"] == found["phase group g: protocol"] == found["preset there: file"] == ("ok", "")
    )
    assert failures == {
        "backbone gathers: protocol": "Backbone has no method find_sequence_mixers",
        "backbone none: fields": "model_types is empty",
        "backbone none: protocol": "Strategy has no default_keywords",
        "preset gone: file": "the package eulerforge has no file gone.toml",
        "preset lost: file": "the package shop_nowhere has no file gone.toml",
    }


def test_a_heavy_import_is_seen_in_a_fresh_process(shop):
    shop.module("numpy_free", "")
    shop.plugin("one", "import numpy\n" + strategy().replace("\n    ", "\n"))
    status, reason = rows(shop)["light import"]
    assert status == "failed"
    assert "imports numpy" in reason


def test_a_plugin_that_ends_the_process(shop):
    shop.plugin("one", "import os, sys\nif sys.argv[0] == '-c': os._exit(9)\n" + strategy().replace("\n    ", "\n"))
    status, reason = rows(shop)["light import"]
    assert status == "failed"
    assert reason.endswith("ends the process: exit code 9")


def test_a_broken_plugin(shop):
    shop.plugin("one", "raise RuntimeError('deep')")
    found = rows(shop)
    assert found["load"] == ("failed", "RuntimeError while loading: deep")
    assert found["light import"][0] == "failed"
    assert found["specs"][0] == found["targets"][0] == found["protocols"][0] == "skipped"


def test_a_conflict_and_an_empty_plugin(shop):
    shop.strategy("one")
    shop.strategy("two", offers="one")
    assert rows(shop)["names"] == ("failed", "strategy 'one' is offered by dist-two:two too")
    shop.entry_points.clear()
    shop.plugin("nothing")
    assert rows(shop)["offers"][0] == "failed"


def test_a_disabled_plugin_is_not_touched(shop):
    shop.strategy("one")
    assert rows(shop, disable=["one"]) == {"load": ("skipped", "switched off by --no-plugin")}


def test_keys_of_a_config_class(shop):
    shop.strategy("one")
    keys = {key.name: key for key in describe_keys(shop.registry().strategy_config("one"), "injection.")}
    assert keys["injection.scale"].default_text == "1.0"
    assert (keys["injection.target_keywords"].type, keys["injection.target_keywords"].default) == ("list of str", [])
    assert keys["injection.match"].choices == ("role", "exact")
    assert all(key.help for key in keys.values())


def test_types_as_text():
    assert type_text(int | None) == "int or none"
    assert type_text(tuple[float, float]) == "list of 2: float, float"
    assert type_text(dict[str, int]) == "dict[str, int]"
