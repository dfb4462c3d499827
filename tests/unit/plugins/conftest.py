"""Fake plugins: modules written to a folder, named by fake entry points; nothing is installed, no torch is needed."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from eulerforge.plugins import Registry, load_registry


@attrs.frozen
class FakeEntryPoint:
    """What ``importlib.metadata.EntryPoint`` looks like from here."""

    name: str
    value: str
    dist: Any

    def load(self) -> Any:
        return importlib.import_module(self.value)


class Shop:
    """Makes plugins and a registry of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entry_points: list[FakeEntryPoint] = []

    def module(self, name: str, source: str) -> None:
        """Write an importable module; the name must not exist elsewhere."""
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()

    def plugin(
        self, name: str, source: str = "", *, distribution: str | None = None, api: str | None = "1.0", module: str = ""
    ) -> None:
        """A plugin whose entry module has ``source`` after the usual imports."""
        module = module or f"shop_{name}_{len(self.entry_points)}"
        head = "from eulerforge.api import *\n" + (f"EULERFORGE_API = {api!r}\n" if api is not None else "")
        self.module(module, head + textwrap.dedent(source))
        dist = SimpleNamespace(name=distribution or f"dist-{name}", version="1.2.3")
        self.entry_points.append(FakeEntryPoint(name, module, dist))

    def strategy(
        self, name: str, *, offers: str | None = None, distribution: str | None = None, extra: str = ""
    ) -> None:
        """A plugin that offers one strategy."""
        self.plugin(
            name,
            f"""
            @hookimpl
            def eulerforge_strategies():
                return [StrategySpec(name={offers or name!r}, target="shop_target:Strategy",
                                     config_target="shop_config:Config", summary="s", groups=("lora",) {extra})]
            """,
            distribution=distribution,
        )

    def registry(self, **options: Any) -> Registry:
        options.setdefault("environ", {})
        return load_registry(entry_points=self.entry_points, **options)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    made = Shop(tmp_path)
    made.module(
        "shop_config",
        """
        import attrs
        from eulerforge.api import InjectionConfig, setting

        @attrs.frozen(kw_only=True)
        class Config(InjectionConfig):
            scale: float = setting(1.0, help="the scale")

        @attrs.frozen(kw_only=True)
        class Silent(InjectionConfig):
            scale: float = 1.0

        class NoAttrs:
            pass
        """,
    )
    made.module(
        "shop_target",
        """
        class Strategy:
            def inject(self, model, adapter, config, context):
                return "injected"

        class Short:
            def inject(self, model):
                return None

        class Raising:
            def __init__(self):
                raise RuntimeError("no luck")

        class Backbone:
            default_keywords = ("gate_proj",)
            def find_transformer_layers(self, model): return []
            def find_sites(self, layer): return []
            def find_routers(self, layer): return []
            def roles_of(self, keyword): return []

        class Resolver:
            def resolve(self, model, adapter, report): return {"lora": ("a",), "router": ("b",)}
        """,
    )
    yield made
    for name in set(sys.modules) - before:
        if name.startswith("shop_"):
            del sys.modules[name]


Status = Callable[[str], str]


def statuses(registry: Registry) -> dict[str, str]:
    return {record.name: record.status for record in registry.records}
