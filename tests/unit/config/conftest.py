"""A strategy config of the tests' own: the config floor knows no plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import pytest

from eulerforge.api import InjectionConfig, Problem, setting
from eulerforge.config import LoadedConfig, load_run_config


@attrs.frozen(kw_only=True)
class Attention:
    enabled: bool = setting(False, help="adapt attention")
    keywords: tuple[str, ...] = setting(("q_proj",), help="names")


@attrs.frozen(kw_only=True)
class Strategy(InjectionConfig):
    lora_r: int = setting(16, help="rank")
    lora_dropout: float = setting(0.0, ge=0, lt=1, help="dropout")
    attn_lora: Attention = setting(factory=Attention, help="attention")

    def check(self) -> Iterable[Problem]:
        yield from super().check()
        if self.lora_r < 1:
            yield Problem(key="lora_r", message="LoRA layers will act as Identity", hint="lora_r must be 1 or higher")


Load = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write ``text`` as a preset and load it."""

    def loader(text: str, *sets: str, suffix: str = ".toml", **options: Any) -> LoadedConfig:
        path = tmp_path / f"preset{suffix}"
        path.write_text(text, encoding="utf-8")
        return load_run_config(str(path), sets, strategy_configs=lambda _: Strategy, **options)

    return loader
