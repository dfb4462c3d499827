"""Forwards of one's own on the instances of a model's modules, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import attrs
from torch import nn


@attrs.frozen(kw_only=True, eq=False)
class Replaced:
    """How many modules have a forward of our own, and which classes were left as they are."""

    count: int
    left: tuple[str, ...]
    _words: str
    _modules: tuple[nn.Module, ...]

    def remove(self) -> None:
        """Put every module back as it was."""
        for module in self._modules:
            del module.forward

    def line(self) -> str:
        """What a run says at its start."""
        left = f"; left as they are: {', '.join(self.left)}" if self.left else ""
        return f"{self._words.format(self.count)}{left}"


def replace_forwards(
    model: nn.Module,
    looks_like_one: Callable[[Any], bool],
    forward_for: Callable[[Any], Callable[..., Any] | None],
    words: str,
) -> Replaced:
    """Give the modules that look like one the forward that was found for each; None leaves the module as it is."""
    done, left = [], Counter[str]()
    for module in model.modules():
        if "forward" in vars(module) or not looks_like_one(module):
            continue
        forward = forward_for(module)
        if forward is None:
            left[type(module).__name__] += 1
            continue
        # bound, so that a copy of the module computes with the copy's tensors
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        done.append(module)
    names = tuple(f"{count} {name}" for name, count in sorted(left.items()))
    return Replaced(count=len(done), left=names, words=words, modules=tuple(done))
