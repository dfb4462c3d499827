"""What became of the rows: read, used, cut and dropped, and what training will see of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from eulerforge.data.findings import Finding


@attrs.frozen(kw_only=True)
class PartReport:
    """The rows of one part, training or validation, after tokenizing.

    ``lost_tokens`` are those that were cut off or dropped; ``longest`` is the longest usable row before it was cut.
    ``unread`` counts the rows that have a column which no kind of row reads.
    """

    files: tuple[str, ...]
    rows_read: int
    kinds: dict[str, int]
    dropped: dict[str, int]
    truncated: int
    lost_tokens: int
    longest: int
    findings: Mapping[str, Finding]
    unread: dict[str, int]

    @property
    def rows_usable(self) -> int:
        return self.rows_read - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        findings = {name: {"count": one.count, "first": list(one.first)} for name, one in self.findings.items()}
        plain = attrs.asdict(self, recurse=False)
        return {**plain, "files": list(self.files), "findings": findings, "rows_usable": self.rows_usable}


@attrs.frozen(kw_only=True)
class DataReport:
    """``parts`` are what was read (the training files; the validation's own files if it has any).

    ``train_repeated`` counts training rows that are the same as an earlier one.
    ``cache`` is hit, built or off; ``notes`` are sentences that the user should read.
    """

    parts: tuple[PartReport, ...]
    rendering: str
    max_length: int
    train_rows: int
    train_tokens: int
    train_label_tokens: int
    validation_rows: int
    validation_tokens: int
    validation_label_tokens: int
    cache: str
    train_repeated: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as sentences; what was dropped or cut is always said."""
        out = []
        for part in self.parts:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in part.kinds.items())
            out.append(f"{', '.join(part.files)}: {part.rows_read:,} rows read ({kinds}), {part.rows_usable:,} usable")
            if part.unread:
                columns = ", ".join(f"{name} ({count:,} rows)" for name, count in part.unread.items())
                out.append(f"  columns that are not read: {columns}")
            if part.truncated:
                out.append(f"  {part.truncated:,} rows truncated to data.max_length = {self.max_length:,} tokens")
            out += [f"  {count:,} rows dropped: {reason}" for reason, count in part.dropped.items() if count]
            if part.lost_tokens:
                out.append(f"  {part.lost_tokens:,} tokens are lost with them; the longest row has {part.longest:,}")
            out += [f"  {one.count:,} rows with {name}: {one.places()}" for name, one in part.findings.items()]
        for name, rows, tokens, labels in (
            ("training", self.train_rows, self.train_tokens, self.train_label_tokens),
            ("validation", self.validation_rows, self.validation_tokens, self.validation_label_tokens),
        ):
            if rows:
                share = f"{labels:,} trained on" if name == "training" else f"{labels:,} counted in the loss"
                out.append(f"{name}: {rows:,} rows, {tokens:,} tokens, {share} ({labels / tokens:.0%})")
        if self.train_repeated:
            out.append(f"  {self.train_repeated:,} training rows repeat an earlier one")
        out.append(f"rendered with {self.rendering}; token cache: {self.cache}")
        return out + list(self.notes)

    def to_json(self) -> dict[str, Any]:
        plain = attrs.asdict(self, recurse=False)
        return {**plain, "parts": [part.to_json() for part in self.parts], "notes": list(self.notes)}
