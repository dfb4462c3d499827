"""Whose code was running when a run fell over."""

from __future__ import annotations

import sys
import types
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eulerforge.errors import ConfigError, PluginError
from eulerforge.training.blame import plugin_blamed

REGISTRY: Any = SimpleNamespace(
    records=(
        SimpleNamespace(module="broken_adapter.plugin", qualified_name="broken-adapter:broken", version="2.5"),
        SimpleNamespace(module="", qualified_name="no-module:none", version="0"),
    )
)
SOURCE = """
import torch

class Layer(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.linear(x, torch.zeros(3, 3))

def falls(error):
    raise error
"""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("broken_adapter.layers")
    exec(compile(SOURCE, "broken_adapter/layers.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_plugin_s_layer_is_named_with_its_version_place_and_step_even_when_torch_raised(plugin: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), plugin.Layer())
    with pytest.raises(PluginError) as blamed, plugin_blamed(REGISTRY, lambda: 6):
        model(torch.zeros(2, 5))
    message = str(blamed.value)
    assert message.startswith("plugin broken-adapter:broken 2.5 raised RuntimeError in step 7: mat1 and mat2 shapes")
    assert "broken_adapter.layers.Layer.forward, broken_adapter/layers.py:6" in message
    assert "\n" not in message
    assert blamed.value.exit_code == 3


def test_a_package_that_is_no_plugin_is_named_by_its_distribution(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.__dict__["__name__"] = "iniconfig.made_up"
    version = metadata.version("iniconfig")
    with pytest.raises(PluginError) as blamed, plugin_blamed(REGISTRY, lambda: 0):
        plugin.falls(KeyError("lost"))
    assert str(blamed.value).startswith(f"the package iniconfig {version} raised KeyError")


def test_our_own_errors_and_running_out_of_memory_pass_as_they_are(plugin: Any) -> None:
    for error in (ConfigError("said well already"), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with pytest.raises(type(error)) as passed, plugin_blamed(REGISTRY, lambda: 0):
            plugin.falls(error)
        assert passed.value is error


def test_a_fault_of_torch_or_of_ours_is_nobody_s_plugin() -> None:
    with pytest.raises(RuntimeError, match="shape"), plugin_blamed(REGISTRY, lambda: 0):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
