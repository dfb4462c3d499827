"""Plugins as an installer leaves them: a module and a ``dist-info`` folder with an entry point."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

HEAD = 'from eulerforge.api import *\nEULERFORGE_API = "1.0"\n'
STRATEGY = """
@hookimpl
def eulerforge_strategies():
    return [StrategySpec(name="forged", target="{module}.target:Forged", summary="s", groups=("lora",),
                         config_target="eulerforge_strategy_dense_lora.config:DenseLoRAConfig")]
"""
TARGET = """
from eulerforge_strategy_dense_lora.injection import DenseLoRAInjection

class Forged(DenseLoRAInjection):
    def inject(self, model, adapter, config, context):
        {before}
        return super().inject(model, adapter, config, context)
"""


class Forge:
    """Installs plugins into ``folder``, which is on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, source: str) -> None:
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()

    def plugin(self, module: str, source: str = "", **metadata: Any) -> None:
        """A distribution with one entry point; ``entry``, ``distribution`` and ``entry_points`` may be given."""
        (self.folder / module).mkdir()
        self.module(f"{module}/__init__", HEAD + textwrap.dedent(source))
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        distribution = metadata.get("distribution", module.replace("_", "-"))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
        entry = f"[eulerforge.plugins]\n{metadata.get('entry', 'forged')} = {module}\n"
        (info / "entry_points.txt").write_text(metadata.get("entry_points", entry), encoding="utf-8")

    def strategy(self, module: str, before: str, *, imports: str = "") -> None:
        """A plugin with the strategy ``forged``: ``dense_lora`` that runs ``before`` when it injects."""
        self.plugin(module, STRATEGY.format(module=module))
        self.module(f"{module}/target", imports + TARGET.format(before=before))
