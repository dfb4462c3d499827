"""Names to offers, and who else claims a name: where two distributions meet, neither wins.

Notable: a conflict belongs to one name. The other names of the same plugin, and of the same offer, still work.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from eulerforge.plugins.discovery import canonical
from eulerforge.plugins.records import CONFLICT, OK, Offer, PluginRecord

Claim = tuple[PluginRecord, Offer]


@attrs.frozen
class Index:
    """``claims`` maps (kind, name or alias) to all who offer it; phase groups' own names have the kind ``group``."""

    claims: dict[tuple[str, str], list[Claim]]

    @classmethod
    def of(cls, records: Sequence[PluginRecord]) -> Index:
        claims: dict[tuple[str, str], list[Claim]] = {}
        for record in records:
            for offer in record.offers:
                for label in offer.labels:
                    claims.setdefault((offer.kind, label), []).append((record, offer))
                for group in getattr(offer.spec, "groups", ()) if offer.kind == "phase_group" else ():
                    claims.setdefault(("group", group), []).append((record, offer))
        return cls(claims)

    def find(self, kind: str, name: str) -> list[Claim]:
        """All claims on a name; a qualified name ``distribution:name`` asks one distribution only."""
        distribution, colon, plain = name.rpartition(":")
        found = self.claims.get((kind, plain), [])
        if not colon:
            return found
        return [claim for claim in found if canonical(claim[0].distribution) == canonical(distribution)]

    def is_contested(self, kind: str, name: str) -> bool:
        return len(self.claims.get((kind, name), ())) > 1

    def names(self, kind: str) -> list[str]:
        return sorted(name for claimed, name in self.claims if claimed == kind)


def mark_conflicts(records: Sequence[PluginRecord], index: Index) -> tuple[PluginRecord, ...]:
    """The same records, those that share a name with another marked as in conflict."""
    return tuple(_marked(record, index) for record in records)


def _marked(record: PluginRecord, index: Index) -> PluginRecord:
    if record.status != OK:
        return record
    shared: list[str] = []
    rivals: list[PluginRecord] = []
    for (kind, label), claims in index.claims.items():
        owners = [owner for owner, _ in claims]
        others = [owner for owner in owners if owner is not record]
        if others and len(others) < len(owners):
            shared.append(f"{kind.replace('_', ' ')} {label!r} is offered by {_listed(others)} too")
            rivals += [other for other in others if other not in rivals]
    if not shared:
        return record
    return attrs.evolve(
        record,
        status=CONFLICT,
        reason="; ".join(shared),
        hint=f"write the qualified name {record.distribution}:NAME, or switch one off: "
        f"--no-plugin {rivals[0].qualified_name}",
    )


def _listed(records: Sequence[PluginRecord]) -> str:
    return " and ".join(record.qualified_name for record in records)
