"""Lookups: names, aliases, qualified names, conflicts, and who is to blame."""

from __future__ import annotations

import pytest

from eulerforge.errors import ModelError, PluginError
from eulerforge.plugins.isolation import PluginFailure


def failed(call) -> PluginError:
    with pytest.raises(PluginError) as caught:
        call()
    return caught.value


def backbone(name: str, model_types: str = '("llama",)') -> str:
    return f"""
    @hookimpl
    def eulerforge_backbones():
        return [BackboneSpec(name={name!r}, target="shop_target:Backbone", summary="s", model_types={model_types})]
    """


def test_names_aliases_and_qualified_names(shop):
    shop.strategy("one", extra=", aliases=('uno',)")
    registry = shop.registry()
    spec = registry.strategy("one")
    assert registry.strategy("uno") is registry.strategy("dist-one:one") is registry.strategy("Dist_One:uno") is spec
    assert registry.create(spec).inject(None, None, None, None) == "injected"
    assert registry.strategy_config("uno").__name__ == "Config"
    assert registry.owner(spec).name == "one"


def test_an_unknown_name_gets_the_nearest(shop):
    shop.strategy("dense_lora")
    error = failed(lambda: shop.registry().strategy("dense_lra"))
    assert error.problems[0].message == "there is no strategy 'dense_lra'"
    assert error.problems[0].hint == "did you mean 'dense_lora'?"
    assert error.problems[0].key == "injection.strategy"


def test_an_unknown_name_without_a_near_one_lists_what_there_is(shop):
    shop.strategy("dense_lora")
    assert "known: dense_lora" in failed(lambda: shop.registry().strategy("zzz")).problems[0].hint
    assert "none is installed" in failed(lambda: shop.registry().backbone("zzz")).problems[0].hint


def test_the_error_names_the_plugin_that_might_have_offered_it(shop):
    shop.plugin("moe", "raise RuntimeError('deep')")
    shop.strategy("off")
    registry = shop.registry(disable=["off"])
    message = str(failed(lambda: registry.strategy("moe")))
    assert "dist-moe:moe (broken: RuntimeError while loading: deep)" in message
    assert "dist-off:off (disabled: switched off by --no-plugin)" in message


def test_in_a_conflict_neither_wins(shop):
    for distribution in ("a", "b"):
        shop.plugin(
            f"entry_{distribution}",
            f"""
            @hookimpl
            def eulerforge_strategies():
                common = dict(config_target="shop_config:Config", summary="s")
                return [StrategySpec(name="dense", target="shop_target:Strategy", **common),
                        StrategySpec(name="own_{distribution}", target="shop_target:Strategy", **common)]
            """,
            distribution=distribution,
        )
    registry = shop.registry()
    assert [record.status for record in registry.records] == ["conflict", "conflict"]
    assert registry.records[0].reason == "strategy 'dense' is offered by b:entry_b too"
    assert registry.records[1].reason == "strategy 'dense' is offered by a:entry_a too"
    error = failed(lambda: registry.strategy("dense"))
    assert str(error) == "several plugins offer the strategy 'dense': a:entry_a, b:entry_b"
    assert error.problems[0].hint.startswith("write a:dense or b:dense")
    assert registry.owner(registry.strategy("b:dense")).distribution == "b"
    assert registry.strategy("own_a").name == "own_a"
    assert shop.registry(disable=["entry_a"]).strategy("dense").name == "dense"
    assert len(registry.faults()) == 2


def test_an_alias_may_conflict_and_the_name_still_works(shop):
    shop.strategy("one", extra=", aliases=('two',)")
    shop.strategy("two")
    registry = shop.registry()
    assert [record.status for record in registry.records] == ["conflict", "conflict"]
    assert registry.strategy("one").name == "one"
    failed(lambda: registry.strategy("two"))
    assert registry.strategy("dist-two:two").name == "two"


def test_one_name_of_two_kinds_is_no_conflict(shop):
    shop.strategy("same")
    shop.plugin("other", backbone("same"))
    assert [record.status for record in shop.registry().records] == ["ok", "ok"]


def test_backbone_for_a_model_type(shop):
    shop.plugin("llama3", backbone("llama3"))
    shop.plugin("mine", backbone("mine"))
    registry = shop.registry()
    assert registry.backbone_for("gpt") is None
    error = failed(lambda: registry.backbone_for("llama"))
    assert "dist-llama3:llama3, dist-mine:mine" in str(error)
    assert error.problems[0].hint == "--set backbone=llama3 or --set backbone=mine"
    assert [spec.name for spec in registry.backbones_for("llama")] == ["llama3", "mine"]
    assert shop.registry(disable=["mine"]).backbone_for("llama").name == "llama3"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("shop_nowhere:X", "No module named 'shop_nowhere'"),
        ("shop_target:Absent", "shop_target has no attribute 'Absent'"),
        ("shop_target:Raising", "RuntimeError while making one: no luck"),
    ],
)
def test_a_bad_target_fails_only_when_asked_for(shop, target, words):
    shop.plugin(
        "one",
        f"""
        @hookimpl
        def eulerforge_strategies():
            return [StrategySpec(name="one", target="{target}", config_target="shop_config:NoAttrs", summary="s")]
        """,
    )
    registry = shop.registry()
    assert registry.records[0].status == "ok"
    error = failed(lambda: registry.create(registry.strategy("one")))
    assert words in str(error)
    assert "plugin dist-one:one" in str(error)
    assert "extends InjectionConfig" in str(failed(lambda: registry.strategy_config("one")))


RESOLVER = """
@hookimpl
def eulerforge_phase_groups():
    return [PhaseGroupSpec(name={name!r}, target="shop_target:Resolver", summary="s", groups={groups!r})]
"""


def test_phase_resolvers(shop):
    shop.plugin("phases", RESOLVER.format(name="standard", groups=("lora", "router")))
    ((spec, resolver),) = shop.registry().phase_resolvers()
    assert spec.groups == ("lora", "router")
    assert resolver.resolve(None, None, None) == {"lora": ("a",), "router": ("b",)}


def test_a_contested_group_belongs_to_nobody(shop):
    shop.plugin("phases", RESOLVER.format(name="standard", groups=("lora", "router")))
    shop.plugin("more", RESOLVER.format(name="more", groups=("router", "lora2", "lora")).replace(', "lora")', ")"))
    registry = shop.registry()
    assert {record.status for record in registry.records} == {"conflict"}
    assert "group 'router' is offered by dist-more:more too" in registry.records[1].reason
    assert all(resolver.resolve(None, None, None) == {} for _, resolver in registry.phase_resolvers())


def test_an_undeclared_group_is_refused(shop):
    shop.plugin("phases", RESOLVER.format(name="standard", groups=("lora",)))
    ((_, resolver),) = shop.registry().phase_resolvers()
    assert "names the group 'router', which it does not declare" in str(
        failed(lambda: resolver.resolve(None, None, None))
    )


def test_a_resolver_that_raises_is_named(shop):
    shop.module(
        "shop_resolvers",
        """
        from eulerforge.errors import ModelError
        class Bug:
            def resolve(self, model, adapter, report): return 1 / 0
        class Says:
            def resolve(self, model, adapter, report): raise ModelError("the model has no router")
        """,
    )
    for name in ("Bug", "Says"):
        shop.plugin(
            name.lower(),
            RESOLVER.format(name=name.lower(), groups=(name,)).replace(
                "shop_target:Resolver", f"shop_resolvers:{name}"
            ),
        )
    (_, bug), (_, says) = shop.registry().phase_resolvers()
    assert "plugin dist-bug:bug: bug: ZeroDivisionError" in str(failed(lambda: bug.resolve(None, None, None)))
    with pytest.raises(ModelError, match="no router"):
        says.resolve(None, None, None)


def test_linear_ops_asks_each_plugin_in_its_own_try(shop):
    answer = "@hookimpl\ndef eulerforge_linear_ops(module):\n    return {}"
    shop.plugin("a", answer.format("'ops of a' if module == 'a' else None"))
    shop.plugin("b", answer.format("1 / 0"))
    shop.plugin("c", "@hookimpl\ndef eulerforge_linear_ops():\n    return None")
    registry = shop.registry()
    assert registry.linear_ops("a") == "ops of a"
    # its format may be the one of the plugin that failed
    with pytest.raises(PluginError, match="plugin dist-b:b failed: ZeroDivisionError"):
        registry.linear_ops("other")


def test_presets(shop):
    shop.plugin(
        "p", "@hookimpl\ndef eulerforge_presets():\n    return [PresetSpec(name='mine', package='x', file='p.toml')]"
    )
    assert [spec.name for spec in shop.registry().presets()] == ["mine"]


def test_a_failure_keeps_its_words():
    assert PluginFailure("why", hint="how").hint == "how"
