"""A phase-group resolver held to its word: it may name only the groups that its spec declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from eulerforge.errors import EulerForgeError, PluginError
from eulerforge.plugins.isolation import PluginFailure, isolated

if TYPE_CHECKING:
    from torch import nn

    from eulerforge.api import BackboneAdapter, InjectionReport, PhaseGroupResolver, PhaseGroupSpec


@attrs.frozen
class DeclaredGroups:
    """Wraps ``resolver``; ``groups`` are those of ``spec`` that no other plugin claims, ``plugin`` is who to blame."""

    resolver: PhaseGroupResolver
    spec: PhaseGroupSpec
    groups: tuple[str, ...]
    plugin: str

    def resolve(
        self, model: nn.Module, adapter: BackboneAdapter, report: InjectionReport
    ) -> Mapping[str, Sequence[str]]:
        """The resolver's answer, contested groups left out.

        Raises:
            PluginError: it raised, or it names a group that it does not declare.
        """
        try:
            found = isolated("resolving phase groups", lambda: dict(self.resolver.resolve(model, adapter, report)))
        except PluginFailure as failure:
            if isinstance(failure.__cause__, EulerForgeError):
                raise failure.__cause__ from None
            raise PluginError(
                f"plugin {self.plugin}: {self.spec.name}: {failure.reason}",
                hint=failure.hint or "--debug shows the traceback; report it to the plugin's author",
            ) from failure
        undeclared = sorted(set(found) - set(self.spec.groups))
        if undeclared:
            raise PluginError(
                f"plugin {self.plugin}: {self.spec.name} names the group {undeclared[0]!r}, which it does not declare",
                hint=f"its author adds it to groups of PhaseGroupSpec({self.spec.name!r})",
            )
        return {group: names for group, names in found.items() if group in self.groups}
