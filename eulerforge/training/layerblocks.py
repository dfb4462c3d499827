"""What one decoder layer makes and frees, for any number of tokens, from the events of two passes over it.

Notable: a block is known by the order of its birth, so two passes that do the same operations give the same numbers,
and each block's size is fitted by itself. Where loops over chunks of tokens do other operations for more tokens, only
their sums can be fitted.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise

import attrs

from eulerforge.training.blocks import BlockRecord, Event, Size, Step, fitted

OWN = 1 << 30
"""Numbers from here on are of blocks that sums were made into."""
STATES, RESULT, GRADIENT, NEXT, GIVEN, ROOM = -1, -2, -3, -4, -5, -6
"""Blocks that come from another layer or go to one: the hidden states and their gradient, as they come in and out."""
SPANS = ("before", "forward", "after", "head", "backward")


@attrs.frozen(kw_only=True)
class LayerBlocks:
    """What a layer makes and frees, and what happens before it, after it, and in the gradient above it.

    ``laid_out`` are the bytes of weights that the first pass copied to another place, ``grown`` by how much they grew;
    ``rooms`` are those of ``models/room.py``, which all layers share.
    """

    before: tuple[Step, ...]
    forward: tuple[Step, ...]
    after: tuple[Step, ...]
    head: tuple[Step, ...]
    backward: tuple[Step, ...]
    laid_out: int = 0
    grown: int = 0
    rooms: Mapping[Hashable, Size] = attrs.field(factory=dict)

    def kept(self, tokens: int, square: int) -> int:
        """Bytes between forward and backward, the hidden states that the layer was given and gives left out."""
        made = {step.block: step.size for step in self.forward if step.size is not None and step.block >= 0}
        freed = {step.block for step in self.forward if step.size is None}
        return sum(size.at(tokens, square) for block, size in made.items() if block not in freed)


@attrs.frozen
class LayerRecord:
    """The events of one pass between its marks, the blocks numbered in the order of their birth."""

    spans: dict[str, list[Event]]
    rooms: dict[Hashable, int] = attrs.field(factory=dict)

    @classmethod
    def of(cls, record: BlockRecord, named: dict[int | None, int]) -> LayerRecord:
        events, marks = record.events, record.marks
        last = marks.get("back", marks["loss"])
        edges = [0, marks["in"], marks["out"], marks["loss"], last, marks["end"], len(events)]
        numbers = {block: number for block, number in named.items() if block is not None}
        parts = []
        for start, end in pairwise(edges):
            part = []
            for event in events[start:end]:
                numbers.setdefault(event.block, event.block)
                if numbers[event.block] not in (GIVEN, ROOM):
                    part.append(Event(numbers[event.block], event.size))
            parts.append(part)
        before, forward, after, head, backward, late = parts
        # what is freed a moment later; what is never freed are the adapters' gradients
        backward += [event for event in late if event.size is None and event.block != NEXT]
        return cls(dict(zip(SPANS, (before, forward, after, head, backward), strict=True)))

    def sums(self) -> tuple[int, int, int, int]:
        """Bytes: highest level on the way up, kept, highest level on the way down, gradients."""
        live: dict[int, int] = {}
        results = []
        for name in ("forward", "backward"):
            most = level = 0
            for event in self.spans[name]:
                if event.size is None:
                    level -= live.pop(event.block, 0)
                else:
                    live[event.block] = event.size
                    level += event.size
                most = max(most, level)
            own = sum(size for block, size in live.items() if block >= 0)
            results += [most, own]
        return results[0], results[1], results[2], results[3]


def combined(at_n: LayerRecord, at_2n: LayerRecord, tokens: int) -> LayerBlocks:
    whole = {name: fitted(few, at_2n.spans[name], tokens) for name, few in at_n.spans.items()}
    if whole["forward"] is None or whole["backward"] is None:
        # loops over chunks of tokens: other operations, so only their sums can be fitted
        whole["forward"], whole["backward"] = _summed(at_n, at_2n, tokens)
    before, forward, after, head, backward = (tuple(whole[name] or ()) for name in SPANS)
    return LayerBlocks(before=before, forward=forward, after=after, head=head, backward=backward)


def _summed(at_n: LayerRecord, at_2n: LayerRecord, tokens: int) -> tuple[list[Step], list[Step]]:
    """Both ways of a layer as three blocks: the workspace of each, what is kept between them, and the gradients."""
    sums = zip(at_n.sums(), at_2n.sums(), strict=True)
    up, kept, down, stays = (Size.straight(few, many, tokens) for few, many in sums)
    ends = {event.block: event.size for span in at_n.spans.values() for event in span if event.size is not None}
    states = Size.fitted(ends[RESULT] or 0, 2 * (ends[RESULT] or 0), tokens)
    inside = [event.block for event in at_n.spans["forward"] if event.size is None and event.block == STATES]
    forward = [Step(OWN, up), Step(OWN, None), Step(OWN + 1, kept), Step(RESULT, states)]
    forward += [Step(block, None) for block in inside]
    backward = [
        Step(OWN + 2, down),
        Step(OWN + 2, None),
        Step(OWN + 1, None),
        Step(GRADIENT, None),
        Step(OWN + 3, stays),
        Step(NEXT, states),
    ]
    return forward, backward if inside else [*backward, Step(STATES, None)]
