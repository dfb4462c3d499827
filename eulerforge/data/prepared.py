"""From a preset's data section to tokenized training and validation rows.

Read, parse, render, tokenize, cut, cache, split: each step is a module of its own, this one puts them in a row.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from eulerforge.config.cachedir import cache_root
from eulerforge.data.cache import CacheEntry, EntryWriter, cache_key, tokenizer_sha256
from eulerforge.data.cutting import Cutter
from eulerforge.data.duplicates import count_repeated, overlap_error, row_hashes, shared_rows
from eulerforge.data.files import DataFile, find_files
from eulerforge.data.findings import RowFindings, findings_of
from eulerforge.data.read import BadRows, read_rows
from eulerforge.data.render import Rendered, Renderer, untrained
from eulerforge.data.report import DataReport, PartReport
from eulerforge.data.rows import ProcessedRow, Row, RowParser
from eulerforge.data.split import split_rows
from eulerforge.data.tokenize import Encoded, RowTokenizer, Tokens
from eulerforge.data.tokenized import MemoryRows, RowChunk, TokenizedRows
from eulerforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eulerforge.config.schema import DataConfig

_CHUNK = 1024


@attrs.frozen(kw_only=True)
class Datasets:
    """What a run trains and validates on."""

    train: TokenizedRows
    validation: TokenizedRows | None
    report: DataReport


def build_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, cache_dir: Path | None = None
) -> Datasets:
    """Tokenized rows of the preset's data files, from the cache where it has them.

    ``cache_dir`` None is the default folder. ``seed`` is the run's, for callers that hold only one; which rows are held
    out is ``data.validation.seed``'s alone, so that runs with several seeds are measured on the same rows.
    Raises DataError with every bad row (the first 20 in full), and when no usable row is left.
    """
    del seed
    prepare = _Preparation(config, tokenizer, cache_dir or cache_root())
    files = find_files(config.path)
    train, part = prepare.part(files, max_rows=config.max_rows)
    parts = [part]
    held_out = config.validation
    validation: TokenizedRows | None = None
    if held_out.path:
        own_files = find_files(held_out.path, key="data.validation.path")
        validation, part = prepare.part(own_files, max_rows=None, key="data.validation.path")
        parts.append(part)
        shared = {file.path.resolve() for file in files} & {file.path.resolve() for file in own_files}
        if shared:
            prepare.notes.append("a validation file is also a training file: its loss will say nothing of new rows")
    else:
        kept, away = split_rows(len(train), size=held_out.size, fraction=held_out.fraction, seed=held_out.seed)
        if len(away):
            train, validation = train.subset(kept), train.subset(away)
    hashes = row_hashes(train)
    if validation is not None:
        count, shown = shared_rows(train, validation, (hashes, row_hashes(validation)))
        if count and not held_out.allow_overlap:
            raise overlap_error(count, shown)
        if count:
            prepare.notes.append(f"{count:,} held-out rows are training rows too, as data.validation allows")
    report = DataReport(
        train_repeated=count_repeated(hashes),
        parts=tuple(parts),
        rendering=prepare.rendering,
        max_length=config.max_length,
        train_rows=len(train),
        train_tokens=train.token_count,
        train_label_tokens=train.label_tokens,
        validation_rows=len(validation) if validation is not None else 0,
        validation_tokens=validation.token_count if validation is not None else 0,
        validation_label_tokens=validation.label_tokens if validation is not None else 0,
        cache=prepare.cache_state,
        notes=tuple(prepare.notes),
    )
    return Datasets(train=train, validation=validation, report=report)


class _Preparation:
    """One preset's way from files to rows; collects what to tell the user on the way."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        self.config = config
        self.notes: list[str] = []
        self.cache_state = "hit" if config.cache else "off"
        self._cache = cache / "data"
        self._tokenizer = tokenizer
        self._row_tokenizer = RowTokenizer(tokenizer)
        self._renderer = Renderer(config, tokenizer)
        if self._renderer.writes_the_day and config.format != "processed":
            self.notes.append(
                f"the chat template writes the date into every row, here {self._renderer.day}; --resume keeps the day"
                " on which the run began, and data.date names one for other runs"
            )
        self._processed = config.format == "processed"
        self._tokenizer_hash = tokenizer_sha256(tokenizer) if config.cache else ""

    @property
    def rendering(self) -> str:
        if self._processed:
            return "the file's own token ids"
        return "the tokenizer's chat template" if self._renderer.uses_template else "plain text"

    def part(
        self, files: tuple[DataFile, ...], *, max_rows: int | None, key: str = "data.path"
    ) -> tuple[TokenizedRows, PartReport]:
        names = tuple(file.name for file in files)
        entry = self._entry(files, max_rows) if self.config.cache else None
        loaded = entry.load(names) if entry is not None else None
        if isinstance(loaded, str):
            self.notes.append(f"the token cache entry {loaded}; it was made again")
        if not isinstance(loaded, tuple) and entry is not None:
            loaded = self._into_cache(entry, files, names, max_rows)
        if isinstance(loaded, tuple):
            rows, facts = loaded
        else:
            collected = MemoryRows()
            facts = self._build(files, max_rows, collected)
            rows = collected.finish(names)
        if self._renderer.plain_for_want and {"messages", "conversations"} & set(facts["kinds"]):
            self.notes.append(
                "the tokenizer has no chat template: turns are joined as plain text, which says of none who speaks;"
                " train the -Instruct model, or data.template=none says that it is meant"
            )
        report = PartReport(files=names, **{**facts, "findings": findings_of(facts["findings"], names)})
        if not len(rows):
            raise self._nothing_left(report, key)
        return rows, report

    def _entry(self, files: Sequence[DataFile], max_rows: int | None) -> CacheEntry:
        config = self.config
        key = cache_key(
            {
                "files": [file.sha256() for file in files],
                # The suffix decides between an array and lines.
                "suffixes": [file.path.suffix.lower() for file in files],
                "tokenizer": self._tokenizer_hash,
                "format": config.format,
                "template": config.template,
                "schema": dict(config.schema),
                "system_prompt": config.system_prompt,
                "max_length": config.max_length,
                "on_long": config.on_long,
                "max_rows": max_rows,
                **({"day": str(self._renderer.day)} if self._renderer.writes_the_day else {}),
            }
        )
        return CacheEntry(folder=self._cache, key=key)

    def _into_cache(
        self, entry: CacheEntry, files: Sequence[DataFile], names: tuple[str, ...], max_rows: int | None
    ) -> tuple[TokenizedRows, dict[str, Any]] | None:
        """Tokenize into the cache and read it from there; None when the cache cannot be written, which is noted."""
        try:
            entry.build(lambda writer: self._build(files, max_rows, writer))
        except OSError as error:
            self.cache_state = "off"
            self.notes.append(f"the tokenized rows could not be cached in {entry.folder}: {error.strerror}")
            return None
        self.cache_state = "built"
        loaded = entry.load(names, verify=False)
        return loaded if isinstance(loaded, tuple) else None

    def _build(self, files: Sequence[DataFile], max_rows: int | None, out: MemoryRows | EntryWriter) -> dict[str, Any]:
        """Tokenize the files into ``out``, chunk by chunk; give back what became of the rows."""
        bad = BadRows()
        parser = RowParser(self.config.schema, processed=self._processed, vocabulary=len(self._tokenizer))
        kinds: Counter[str] = Counter()
        cutter = Cutter(max_length=self.config.max_length, drop_long=self.config.on_long == "drop")
        findings = RowFindings(self._tokenizer)
        parsed = islice(_parsed(files, parser, bad), max_rows)
        for rows, chunk, stray, hidden in self._tokenized(parsed, bad):
            kinds.update([row.kind for _, row in rows])
            kept, used, cut = cutter.cut(chunk)
            ends = np.cumsum(kept.lengths)
            # rows that are as long as a row may be
            for place in np.flatnonzero(cut | (self._processed & (kept.lengths == self.config.max_length))).tolist():
                part = slice(int(ends[place] - kept.lengths[place]), int(ends[place]))
                origin = (int(kept.origins[place, 0]), int(kept.origins[place, 1]))
                findings.ending(rows[int(used[place])][1], kept.tokens[part], kept.labelled[part], origin)
            findings.stray(kept, set(_places(used, stray)))
            findings.untrained(kept, _places(used, hidden))
            out.add(kept)
        bad.raise_if_any()
        return {
            "rows_read": kinds.total(),
            "kinds": dict(kinds),
            "unread": parser.unread(),
            **cutter.to_facts(),
            "findings": findings.to_facts(),
        }

    def _tokenized(
        self, parsed: Iterator[tuple[int, Row]], bad: BadRows
    ) -> Iterator[tuple[list[tuple[int, Row]], RowChunk, set[int], set[int]]]:
        """Chunks of rows, their tokens, which of them hold stray special tokens, and which have answers that are not
        trained; none once a row is bad.

        While the tokenizer works on one chunk, the next is parsed and rendered.
        """
        with ThreadPoolExecutor(1) as worker:
            waiting: deque[tuple[list[tuple[int, Row]], list[Rendered], Future[Encoded]]] = deque()
            while True:
                rows = list(islice(parsed, _CHUNK))
                if rows:
                    rendered = self._rendered([row for _, row in rows], bad)
                    # once a row is bad the run will stop: the rest is read for further problems only
                    if not bad.total:
                        waiting.append((rows, rendered, worker.submit(self._row_tokenizer.encode, rendered)))
                if len(waiting) > 1 or (waiting and not rows):
                    before, rendered, encoded = waiting.popleft()
                    chunk = self._chunk(before, rendered, encoded.result(), bad)
                    if not bad.total:
                        stray = {place for place, one in enumerate(rendered) if one.stray}
                        pairs = enumerate(zip(before, rendered, strict=False))
                        yield before, chunk, stray, {place for place, ((_, row), one) in pairs if untrained(row, one)}
                elif not rows:
                    return

    def _rendered(self, rows: Sequence[Row], bad: BadRows) -> list[Rendered]:
        """The rows as text; of rows that come as token ids there is none."""
        if self._processed:
            return []
        written = [row for row in rows if not isinstance(row, ProcessedRow)]
        return [one for one in self._renderer.render_all(written, bad) if one is not None]

    def _chunk(
        self, rows: Sequence[tuple[int, Row]], rendered: Sequence[Rendered], encoded: Encoded, bad: BadRows
    ) -> RowChunk:
        origins = np.array([(file, row.place) for file, row in rows], dtype=np.int64)
        if self._processed:
            return RowChunk.of([_of_ids(row) for _, row in rows if isinstance(row, ProcessedRow)], origins)
        return attrs.evolve(self._row_tokenizer.block(rendered, encoded, bad), origins=origins)

    def _nothing_left(self, report: PartReport, key: str) -> DataError:
        names = ", ".join(report.files)
        if not report.rows_read:
            return DataError(f"{names}: there are no rows", key=key, hint="name a file with at least one row")
        why = "; ".join(f"{reason} ({count:,} rows)" for reason, count in report.dropped.items())
        return DataError(
            f"{names}: none of {report.rows_read:,} rows is left to use: {why}",
            key="data.max_length",
            hint="label what is to be trained (other than -100), or " * self._processed
            + f"raise data.max_length (now {self.config.max_length})",
        )


def _parsed(files: Sequence[DataFile], parser: RowParser, bad: BadRows) -> Iterator[tuple[int, Row]]:
    for index, file in enumerate(files):
        for source in read_rows(file, bad):
            row = parser.parse(source, bad)
            if row is not None:
                yield index, row


def _places(used: npt.NDArray[np.int64], rows: set[int]) -> list[int]:
    """Where these rows of a chunk stand among those in use."""
    places: list[int] = np.flatnonzero(np.isin(used, sorted(rows))).tolist() if rows else []
    return places


def _of_ids(row: ProcessedRow) -> Tokens:
    labelled = np.array(row.labelled, dtype=np.uint8)
    labelled[:1] = 0
    return np.array(row.input_ids, dtype=np.uint32), labelled
