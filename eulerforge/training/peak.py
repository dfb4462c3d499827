"""The peak of a whole training step from the blocks of its layers: forward, loss, backward, for any number of tokens.

Notable: nothing is run. Each layer adds what it keeps on the way up; on the way down it takes its own workspace, leaves
its adapters' gradients, and gives back what it kept. The peak is the largest of these levels, and its parts are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from eulerforge.training.blocks import Step
from eulerforge.training.document_blocks import BLOCK
from eulerforge.training.layerblocks import GRADIENT, NEXT, RESULT, STATES, LayerBlocks

HEAP_BLOCK = 32 << 20
"""From here on the C library maps a block by itself, and gives it back when it is freed."""


@attrs.frozen(kw_only=True)
class MicroBatch:
    """``tokens`` positions, padding included.

    ``square`` is what blocks that grow with the square of a document are counted by: of one document at a time where
    documents are kept apart, of every line elsewhere. ``documents`` says how many documents are kept apart by length,
    and by the tokens before them that another document holds.
    """

    tokens: int
    square: int
    documents: Mapping[tuple[int, int], int] = attrs.field(factory=dict)

    @classmethod
    def of_rows(cls, rows: int, length: int, *, packed: bool) -> MicroBatch:
        """``rows`` rows of ``length`` tokens each."""
        return cls.of_lines(rows, length, {(length, 0): rows}, packed=packed)

    @classmethod
    def of_lines(cls, lines: int, width: int, documents: Mapping[tuple[int, int], int], *, packed: bool) -> MicroBatch:
        """Lines of ``width`` positions with so many documents of each kind; kept apart where ``packed``."""
        longest = max(map(sum, documents))
        square = longest * min(BLOCK, longest) if packed else lines * width * width
        return cls(tokens=lines * width, square=square, documents=documents if packed else {})


@attrs.frozen(kw_only=True)
class LossBlocks:
    """Bytes of the loss: ``room`` stays from call to call, ``work`` is there while it is computed."""

    room: int
    work: int


@attrs.frozen(kw_only=True)
class StepPeak:
    """Bytes at the peak of a step, what lies in the model and the optimizer left out.

    ``small`` is the part of the workspace in blocks below ``HEAP_BLOCK``.
    """

    activations: int
    loss: int
    workspace: int
    gradients: int
    small: int

    @property
    def total(self) -> int:
        return self.activations + self.loss + self.workspace + self.gradients


@attrs.frozen
class _Walk:
    """A span of blocks: its highest level, the level at its end, and what stays as gradients, all from 0."""

    most: int
    net: int
    stays: int
    small: int


def step_peak(layers: Sequence[LayerBlocks], batch: MicroBatch, loss: LossBlocks, *, accumulates: bool) -> StepPeak:
    """The peak of a step's last micro-batch.

    Args:
        layers: from the lowest to the highest.
        accumulates: whether gradients of an earlier micro-batch of the step are there from the start.
    """
    walks = {id(layer): _walks(layer, batch) for layer in layers}
    ups, downs = [walks[id(layer)].up for layer in layers], [walks[id(layer)].down for layer in layers]
    top = walks[id(layers[-1])].top
    gradients = sum(down.stays for down in downs) if accumulates else 0
    kept = walks[id(layers[0])].below
    levels = []

    def level(walk: _Walk, of_loss: int = 0) -> None:
        levels.append(
            StepPeak(
                activations=kept,
                loss=loss.room + of_loss,
                workspace=walk.most,
                gradients=gradients,
                small=min(walk.small, walk.most),
            )
        )

    for up in ups:
        level(up)
        kept += up.net
    level(top, loss.work)
    kept += top.net
    for down in reversed(downs):
        level(down)
        kept += down.net - down.stays
        gradients += 0 if accumulates else down.stays
    return max(levels, key=lambda found: found.total)


def level_above(layers: Sequence[LayerBlocks], batch: MicroBatch) -> int:
    """Bytes that are there when the decoder has given its result."""
    walks = [_walks(layer, batch) for layer in layers]
    return walks[0].below + sum(walk.up.net for walk in walks) + walks[-1].after.net


@attrs.frozen
class _Walks:
    """Of one layer: what lies below it at the start, its way up, its way down, and what is above the last layer."""

    below: int
    up: _Walk
    down: _Walk
    after: _Walk
    top: _Walk


def _walks(layer: LayerBlocks, batch: MicroBatch) -> _Walks:
    spans = (layer.before, layer.forward, layer.after, layer.head, layer.backward)
    sizes = {
        step.block: step.size.at(batch.tokens, batch.square) for span in spans for step in span if step.size is not None
    }
    sizes[STATES] = sizes[RESULT]  # what goes in is as large as what comes out
    return _Walks(
        below=_walk(layer.before, sizes).net,
        up=_walk(layer.forward, sizes),
        down=_walk(layer.backward, sizes),
        after=_walk(layer.after, sizes),
        top=_walk([*layer.after, *layer.head], sizes),
    )


def _walk(steps: Iterable[Step], sizes: dict[int, int]) -> _Walk:
    level = most = small = small_then = 0
    mine: dict[int, int] = {}
    for step in steps:
        size = sizes.get(step.block, 0)
        if step.size is None:
            level -= size
            small -= mine.pop(step.block, 0) if size < HEAP_BLOCK else 0
        else:
            level += size
            mine[step.block] = size
            small += size if size < HEAP_BLOCK else 0
        if level > most:
            most, small_then = level, small
    stays = sum(size for block, size in mine.items() if block not in (RESULT, GRADIENT, NEXT))
    return _Walk(most, level, stays, small_then)
