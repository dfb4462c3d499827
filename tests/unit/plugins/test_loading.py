"""Whatever a plugin does, it becomes a row; the others load."""

from __future__ import annotations

import pytest

from eulerforge.errors import PluginError

GOOD = """
@hookimpl
def eulerforge_strategies():
    yield StrategySpec(name="fine", target="shop_target:Strategy", config_target="shop_config:Config", summary="s")
"""

FAULTS = {
    "raises": ("raise RuntimeError('first line\\nsecond line')", "RuntimeError while loading: first line"),
    "exits": ("import sys\nsys.exit(7)", "it called sys.exit(7) while loading"),
    "generator_exit": ("raise GeneratorExit", "GeneratorExit while loading: no message"),
    "syntax": ("def (:", "SyntaxError while loading"),
    "missing": ("import shop_not_there", "ModuleNotFoundError while loading: No module named 'shop_not_there'"),
    "hook_raises": (
        "@hookimpl\ndef eulerforge_presets():\n    raise KeyError('k')",
        "KeyError while calling eulerforge_presets",
    ),
    "hook_exits": ("import sys\n@hookimpl\ndef eulerforge_presets():\n    sys.exit()", "sys.exit(None) while calling"),
    "late_raise": (
        "@hookimpl\ndef eulerforge_presets():\n"
        "    yield PresetSpec(name='p', package='x', file='y')\n    raise ValueError('late')",
        "ValueError while calling eulerforge_presets: late",
    ),
    "misspelt": ("@hookimpl\ndef eulerforge_strategy():\n    return []", "there is no hook eulerforge_strategy"),
    "unmarked": ("def eulerforge_strategies():\n    return []", "eulerforge_strategies is not marked as a hook"),
    "signature": ("@hookimpl\ndef eulerforge_backbones(model):\n    return []", "wrong signature"),
    "nothing": ("@hookimpl\ndef eulerforge_backbones():\n    pass", "must return a list of BackboneSpec, not NoneType"),
    "bare": (
        "@hookimpl\ndef eulerforge_presets():\n    return PresetSpec(name='p', package='x', file='y')",
        "must return a list of PresetSpec, not PresetSpec",
    ),
    "text": (
        "@hookimpl\ndef eulerforge_backbones():\n    return 'llama'",
        "must return a list of BackboneSpec, not str",
    ),
    "wrong_type": (
        "@hookimpl\ndef eulerforge_backbones():\n    return [PresetSpec(name='p', package='x', file='y')]",
        "must return a list of BackboneSpec; it has a PresetSpec",
    ),
    "bad_field": (
        "@hookimpl\ndef eulerforge_presets():\n    return [PresetSpec(name='p', package='x', file='../y')]",
        "must lie inside the package",
    ),
    "twice": (
        "@hookimpl\ndef eulerforge_presets():\n    return [PresetSpec(name='p', package='x', file='y')] * 2",
        "it offers the preset name 'p' twice",
    ),
    "wrapper": ("@hookimpl(wrapper=True)\ndef eulerforge_backbones():\n    return (yield)", "is a wrapper"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_row_and_the_others_load(shop, fault):
    source, reason = FAULTS[fault]
    shop.plugin("a_fault", source)
    shop.plugin("fine", GOOD)
    registry = shop.registry()
    bad, good = registry.records
    assert (bad.status, good.status) == ("broken", "ok")
    assert reason in bad.reason
    assert "\n" not in bad.reason
    assert bad.hint
    assert not bad.offers
    assert registry.strategy("fine").name == "fine"


def test_a_misspelt_hook_names_the_nearest(shop):
    shop.plugin("x", FAULTS["misspelt"][0])
    assert shop.registry().records[0].hint == "did you mean eulerforge_strategies?"


def test_a_broken_plugin_answers_no_hook(shop):
    shop.plugin(
        "x",
        """
        @hookimpl
        def eulerforge_linear_ops(module):
            return "ops"

        @hookimpl
        def eulerforge_presets():
            raise ValueError
        """,
    )
    registry = shop.registry()
    assert registry.records[0].status == "broken"
    assert registry.linear_ops(None) is None


def test_one_module_under_two_names(shop):
    shop.plugin("a", GOOD, module="shop_shared")
    shop.plugin("b", GOOD, module="shop_shared")
    first, second = shop.registry().records
    assert (first.status, second.status) == ("ok", "broken")
    assert "registered already, by dist-a:a" in second.reason


def test_the_traceback_is_kept(shop):
    shop.plugin("x", "raise RuntimeError('deep')")
    assert "RuntimeError: deep" in shop.registry().records[0].traceback


def test_keyboard_interrupt_is_not_swallowed(shop):
    shop.plugin("x", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        shop.registry()


def test_noise_on_stdout_goes_to_stderr(shop, capsys):
    shop.plugin("x", "print('noise at import')\n" + GOOD.replace("    yield", "    print('noise in hook')\n    yield"))
    assert shop.registry().records[0].status == "ok"
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "noise at import" in shown.err
    assert "noise in hook" in shown.err


@pytest.mark.parametrize(
    ("api", "words", "upgrade"),
    [
        (None, "defines no EULERFORGE_API", "upgrade dist-x"),
        ("one", "malformed", "upgrade dist-x"),
        ("1", "malformed", "upgrade dist-x"),
        ("1.0.0", "malformed", "upgrade dist-x"),
        (1.0, "malformed", "upgrade dist-x"),
        ("1.9", "written for API 1.9, this core has API 1.0", "upgrade eulerforge-core"),
        ("2.0", "written for API 2.0, this core has API 1.0", "upgrade eulerforge-core"),
        ("0.9", "written for API 0.9, this core has API 1.0", "upgrade dist-x"),
    ],
)
def test_api_numbers(shop, api, words, upgrade):
    shop.plugin("x", GOOD, api=api)
    (record,) = shop.registry().records
    assert record.status == "incompatible"
    assert words in record.reason
    assert "1.0" in record.reason
    assert record.hint.startswith(upgrade)


def test_strict_refuses_and_names_all(shop):
    shop.plugin("x", "raise RuntimeError('deep')")
    shop.plugin("y", GOOD, api="7.0")
    with pytest.raises(PluginError) as caught:
        shop.registry(strict=True)
    assert caught.value.exit_code == 3
    assert [problem.message.split(" is ")[0] for problem in caught.value.problems] == [
        "plugin dist-x:x",
        "plugin dist-y:y",
    ]
    shop.registry(strict=True, disable=["x", "y"])


@pytest.mark.parametrize(
    "code",
    [
        "del EULERFORGE_API\n\ndef __getattr__(name):\n    raise ImportError('lazy')",
        "@hookimpl\ndef eulerforge_backbones():\n    return [BackboneSpec(name='x', target='x:y', summary='',"
        " model_types=('x',), aliases=(['x'],))]",
    ],
    ids=["lazy attribute", "alias that is no text"],
)
def test_what_fails_only_when_it_is_read_is_a_row_too(shop, code):
    shop.plugin("x", code)
    (record,) = shop.registry().records
    assert record.status == "broken"
