"""How the rows of one optimizer step become micro-batches, without padding where the model allows it.

Notable: exactly the rows that a padded run would train in the step are cut, and the step's loss is divided by the label
tokens of the whole step, so the gradient is the padded run's whatever the cut is. No document is ever cut.
"flat" lays the documents one after another in a single line, as many as a token budget allows; "bins" fills lines of
max_length by first fit, longest first; "off" sorts by length and pads on the right.
Letters in shapes: L lines, W width of a line, N = L x W positions, D documents, M tokens of the longest document.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from eulerforge.data.batches import Batch, collate
from eulerforge.data.prefixes import Document, Shared, Sizes, documents_of, shared_prefixes
from eulerforge.data.tokenized import TokenizedRows

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig

Lines = list[list[int]]
"""The row indices of a micro-batch, line by line."""

CPU_TOKENS = 2048
"""On the CPU a larger micro-batch is no faster, it only needs more memory."""
CPU_STEP = 16
"""On the CPU the rows of a large matrix product are filled up to a multiple of this: with one other number in eight
(682, 1401) it is a tenth to a fifth slower, and every number that is new costs the time to compile it."""
CPU_STEP_FROM = 512
"""Tokens of a line from which on it is filled up."""


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Segments:
    """Where the documents of a packed batch lie: one after another over its N flattened positions.

    Every position belongs to a document; what fills up the end of a line counts as one. ``after`` is empty, or says of
    each document from which other one, by its number, it goes on; None where it begins anew.
    """

    lengths: tuple[int, ...]
    shape: tuple[int, int]
    device: torch.device
    after: tuple[int | None, ...] = ()

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document, those from which it goes on included."""
        return max(map(sum, zip(self.lengths, self.before, strict=True)))

    @cached_property
    def before(self) -> tuple[int, ...]:
        """How many tokens of another document each goes on from, which is its first position."""
        if not self.after:
            return (0,) * len(self.lengths)
        return tuple(0 if number is None else self.lengths[number] for number in self.after)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Borders of the documents, (D + 1,) int32, as the variable-length kernels want them."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def document_of(self) -> torch.Tensor:
        """Number of the document that each position belongs to, (L, W) int32."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        return numbers.repeat_interleave(torch.tensor(self.lengths)).view(self.shape).to(self.device)

    @cached_property
    def made(self) -> dict[tuple[Any, ...], Any]:
        """What a kernel works out from the borders for all layers; it lives as long as the batch."""
        return {}

    def gather(self, flat: torch.Tensor) -> torch.Tensor:
        """(N, ...) as (D, M, ...): documents as rows padded on the right with a copy of some token."""
        return flat[self._from_flat]

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """(D, M, ...) back as (N, ...)."""
        return rows.flatten(0, 1)[self._into_flat]

    @cached_property
    def _from_flat(self) -> torch.Tensor:
        lengths = torch.tensor(self.lengths)
        place = torch.arange(self.longest)[None, :].minimum(lengths[:, None] - 1)
        return (place + (lengths.cumsum(0) - lengths)[:, None]).to(self.device)

    @cached_property
    def _into_flat(self) -> torch.Tensor:
        inside = torch.arange(self.longest)[None, :] < torch.tensor(self.lengths)[:, None]
        return inside.flatten().nonzero()[:, 0].to(self.device)


@attrs.frozen(kw_only=True)
class Layout:
    """How rows become micro-batches.

    ``packing`` is flat, bins or off. ``token_budget`` limits a flat micro-batch; a longer document is one of its own.
    ``by_length`` is for models that compute parts of a flat batch padded (see ``training/isolation.py``): documents of
    similar length go together, and the budget counts the padding. With ``share_prefixes`` what rows of a flat
    micro-batch begin with alike is there once, and with ``trim`` what is behind a row's last label is not there in a
    packed one (``data/prefixes.py``).
    """

    packing: str
    batch_size: int
    max_length: int
    token_budget: int
    pad_id: int
    by_length: bool = False
    share_prefixes: bool = False
    trim: bool = False

    @classmethod
    def padded(cls, batch_size: int, pad_id: int) -> Layout:
        """Rows padded on the right: right for every model."""
        return cls(packing="off", batch_size=batch_size, max_length=1, token_budget=1, pad_id=pad_id)

    def cut(self, rows: TokenizedRows, indices: Sequence[int]) -> list[Lines]:
        """The micro-batches of these rows; the longest ones come first where the order is free."""
        if self.packing == "flat":
            return [[part] for part in self._flat(rows, indices)]
        if self.packing == "bins":
            lines = first_fit(self._sizes(rows), indices, self.max_length)
        else:
            lines = [[index] for index in self._sizes(rows).longest_first(indices)]
        return [lines[at : at + self.batch_size] for at in range(0, len(lines), self.batch_size)]

    def batch(self, rows: TokenizedRows, lines: Lines, device: torch.device | str) -> Batch:
        """A micro-batch as tensors on ``device``."""
        if self.packing == "off":
            return collate(rows, [index for line in lines for index in line], self.pad_id, device)
        return pack(rows, self.documents(rows, lines), self.pad_id, device)

    def documents(self, rows: TokenizedRows, lines: Lines) -> list[list[Document]]:
        """What lies in each line of a packed micro-batch."""
        return [documents_of(rows, line, share=self.share_prefixes, trim=self.trim) for line in lines]

    def _flat(self, rows: TokenizedRows, indices: Sequence[int]) -> Lines:
        if self.by_length:
            return _similar_lengths(self._sizes(rows), indices, self.token_budget)
        sizes = self._sizes(rows, shared_prefixes(rows, indices) if self.share_prefixes else None)
        parts = first_fit(sizes, indices, self.token_budget)
        even = _evenly(sizes, indices, len(parts))
        return even if max(map(sizes.total, even)) <= max(map(sizes.total, parts)) else parts

    def _sizes(self, rows: TokenizedRows, shared: Shared | None = None) -> Sizes:
        return Sizes(rows, shared or {}, trim=self.trim)

    def most_positions(self, rows_per_step: int) -> int:
        """Positions of the largest micro-batch that can occur."""
        if self.packing == "flat":
            return min(max(self.token_budget, self.max_length), rows_per_step * self.max_length)
        return self.batch_size * self.max_length


def token_budget(config: RunConfig, device: torch.device, *, rows: int | None = None) -> int:
    """Tokens of a flat micro-batch: as told, else never more than ``rows`` (batch_size) of ``max_length`` would be."""
    training, longest = config.training, config.data.max_length
    if training.tokens_per_micro_batch is not None:
        return training.tokens_per_micro_batch
    whole = (rows or training.batch_size) * longest
    return min(whole, max(longest, CPU_TOKENS)) if device.type == "cpu" else whole


def first_fit(sizes: Sizes, indices: Sequence[int], capacity: int) -> Lines:
    """Bins of at most ``capacity`` tokens, filled by first fit, longest first; a longer document gets its own bin."""
    bins: Lines = []
    room: list[int] = []
    for index in sizes.longest_first(indices):
        at = next((at for at, left in enumerate(room) if left >= sizes.of(index, bins[at])), None)
        if at is None:
            bins.append([index])
            room.append(capacity - sizes.of(index))
        else:
            room[at] -= sizes.of(index, bins[at])
            bins[at].append(index)
    return bins


def _evenly(sizes: Sizes, indices: Sequence[int], count: int) -> Lines:
    """``count`` parts of nearly equal tokens: the longest document left goes to the emptiest part."""
    parts: Lines = [[] for _ in range(count)]
    filled = [0] * count
    for index in sizes.longest_first(indices):
        at = filled.index(min(filled))
        filled[at] += sizes.of(index, parts[at])
        parts[at].append(index)
    return parts


def _similar_lengths(sizes: Sizes, indices: Sequence[int], budget: int) -> Lines:
    """Parts of neighbours in length, each at most ``budget`` positions when padded to its longest document."""
    parts: Lines = []
    for index in sizes.longest_first(indices):
        if parts and (len(parts[-1]) + 1) * sizes.of(parts[-1][0]) <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def pack(rows: TokenizedRows, of_lines: list[list[Document]], pad_id: int, device: torch.device | str) -> Batch:
    """Documents one after another in each line, (L, W); positions begin at 0 in a row, whose first token is no label.

    A document is the end of its row unless another one goes on from it.
    """
    width = max(sum(map(len, documents)) for documents in of_lines)
    if torch.device(device).type == "cpu" and width >= CPU_STEP_FROM:
        width += -width % CPU_STEP
    shape = (len(of_lines), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    lengths: list[int] = []
    after: list[int | None] = []
    label_at, next_labels = [], []
    tokens = 0
    for at, documents in enumerate(of_lines):
        number, place = len(lengths), 0
        prefixes = {document.after for document in documents}
        places: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []  # where in the batch each document's tokens are
        for nth, document in enumerate(documents):
            ids, labelled = rows.row(document.row)
            end = place + len(document)
            input_ids[at, place:end] = ids[document.first : document.last]
            position_ids[at, place:end] = np.arange(document.first, document.last)
            places.append(np.arange(at * width + place, at * width + end))
            lengths.append(len(document))
            after.append(None if document.after is None else number + document.after)
            place = end
            if nth not in prefixes:
                before = [places[document.after]] if document.after is not None else []
                predicted = slice(1, document.last + 1)
                is_label = labelled[predicted] != 0
                label_at.append(np.concatenate([*before, places[-1]])[: len(is_label)][is_label])
                next_labels.append(ids[predicted][is_label].astype(np.int64))
                tokens += len(ids)
        if place < width:
            position_ids[at, place:] = np.arange(width - place)
            lengths.append(width - place)
            after.append(None)
    goes_on = tuple(after) if any(one is not None for one in after) else ()
    segments = Segments(lengths=tuple(lengths), shape=shape, device=torch.device(device), after=goes_on)
    if segments.device.type != "cpu":
        segments.cu_seqlens  # noqa: B018 - now; in the first layer it would wait for what the device does
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=None,
        label_at=torch.from_numpy(np.concatenate(label_at)).to(device),
        next_labels=torch.from_numpy(np.concatenate(next_labels)).to(device),
        tokens=tokens,
        position_ids=torch.from_numpy(position_ids).to(device),
        segments=segments,
    )
