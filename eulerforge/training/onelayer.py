"""One decoder layer, forward and backward on a few tokens, and what memory it would take on many.

Notable: the model needs no weights. All layers but one let the hidden states through, and that one gets zeros where it
stands on the meta device: the operations, and so the blocks of memory, are those of the run, on the run's own device.
Layers that are built alike are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import nn

from eulerforge.data.batches import Batch
from eulerforge.data.packing import Segments
from eulerforge.lora.adapted import AdaptedModule
from eulerforge.models.room import fresh_rooms
from eulerforge.training.blocks import BlockRecord, Size
from eulerforge.training.document_blocks import BLOCK, none_kept
from eulerforge.training.forward import hidden_states
from eulerforge.training.gated import lean_mlps
from eulerforge.training.layerblocks import (
    GIVEN,
    GRADIENT,
    NEXT,
    RESULT,
    ROOM,
    STATES,
    LayerBlocks,
    LayerRecord,
    combined,
)
from eulerforge.training.norms import quicken_norms
from eulerforge.training.recompute import SWITCH, Offload
from eulerforge.training.standins import Through, standing_in

TOKENS = BLOCK // 2
"""A layer is computed on this many tokens and on twice as many: no more than one block of attention."""
CHUNK = 64
"""As ``TOKENS``, of layers of linear attention: Gated DeltaNet's chunks are as long."""


def kind_of(layer: nn.Module, label: Hashable, *, takes_gradient: bool) -> Hashable:
    """Layers of one kind make the same blocks: the same modules, shapes, precisions, and tensors that train."""
    modules = tuple((name, type(module).__qualname__, module.extra_repr()) for name, module in layer.named_modules())
    tensors = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return label, takes_gradient, getattr(layer, SWITCH, False), modules, tensors


def record_layer(
    model: Any,
    index: int,
    *,
    device: torch.device,
    packed: bool,
    takes_gradient: bool,
    tokens: int = TOKENS,
    offload: bool = False,
) -> LayerBlocks:
    """The blocks of decoder layer ``index`` of a model whose parameters may be on the meta device.

    Args:
        packed: rows are packed, and the model is isolated (``training/isolation.py``).
        takes_gradient: whether the states that the layer is given want a gradient, as above the first trained layer.
        offload: whether what the layer keeps for its backward pass leaves the device.
    """
    decoder = model.get_decoder()
    was_training, layer = model.training, decoder.layers[index]
    generator = torch.get_rng_state()
    watched = _Watched(layer, takes_gradient)
    with _materialized(decoder, layer, device):
        try:
            model.train()
            others = {at: Through(other) for at, other in enumerate(decoder.layers)}
            records = []
            before = _storages(layer)
            with standing_in(decoder.layers, {**others, index: watched}):
                # the first passes lay weights out anew and make what is made once
                for count in (tokens, 2 * tokens, tokens, 2 * tokens):
                    with fresh_rooms() as kept, none_kept():
                        records.append(_one_pass(model, watched, count, device, packed, kept, offload))
                    _forget_gradients(layer)
            after = _storages(layer)
            moved = [name for name, (place, _) in after.items() if place != before[name][0]]
        finally:
            _forget_gradients(layer)  # of a pass that failed too: the model may be the run's own
            model.train(was_training)
            torch.set_rng_state(generator)
    laid_out = sum(after[name][1] for name in moved)
    grown = laid_out - sum(before[name][1] for name in moved)
    rooms = {name: Size.fitted(records[2].rooms.get(name, 0), size, tokens) for name, size in records[3].rooms.items()}
    return attrs.evolve(combined(records[2], records[3], tokens), laid_out=laid_out, grown=grown, rooms=rooms)


def _forget_gradients(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = None


def _storages(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Place and bytes of what each parameter lies in."""
    return {
        name: (parameter.untyped_storage().data_ptr(), parameter.untyped_storage().nbytes())
        for name, parameter in layer.named_parameters()
    }


def _one_pass(
    model: Any,
    watched: _Watched,
    tokens: int,
    device: torch.device,
    packed: bool,
    rooms: Mapping[Any, torch.Tensor],
    offload: bool,
) -> LayerRecord:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    batch = Batch(
        input_ids=ids,
        attention_mask=None,
        label_at=ids.new_empty(0),
        next_labels=ids.new_empty(0),
        tokens=tokens,
        position_ids=torch.arange(tokens, device=device)[None] if packed else None,
        segments=Segments(lengths=(tokens,), shape=(1, tokens), device=device) if packed else None,
    )
    known = [*model.parameters(), *model.buffers(), *watched.layer.parameters(), *watched.layer.buffers(), ids]
    # of so few tokens every tensor is small; in the run all but the smallest are worth the way
    away = Offload(known, least=1).hooks() if offload else nullcontext()
    with BlockRecord(known, device, watched.record) as record:
        watched.record, watched.named = record, {}
        with away:
            states = hidden_states(model, batch)
        record.mark("loss")
        if states.requires_grad:
            states.backward(torch.ones_like(states))
        del states
        record.mark("end")
        for made in rooms.values():
            watched.named[record.block_of(made)] = ROOM
    sizes = {name: made.untyped_storage().nbytes() for name, made in rooms.items()}
    return attrs.evolve(LayerRecord.of(record, watched.named), rooms=sizes)


class _Watched(Through):
    """The layer itself, with marks where it begins and ends in both directions."""

    record: BlockRecord | None
    named: dict[int | None, int]

    def __init__(self, layer: nn.Module, takes_gradient: bool) -> None:
        super().__init__(layer)
        self.__dict__["takes_gradient"], self.__dict__["record"] = takes_gradient, None

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        record, named = self.record, self.named
        assert record is not None  # noqa: S101 - set for each pass
        # not a leaf, which autograd would hold on to: it is freed when the layer keeps it no more
        own = hidden_states.detach() + torch.zeros(
            (), dtype=hidden_states.dtype, device=hidden_states.device, requires_grad=True
        )
        own = own if self.takes_gradient else own.detach()
        # the copy is recorded in place of what was given
        named[record.block_of(hidden_states)], named[record.block_of(own)] = GIVEN, STATES
        record.mark("in")
        result = self.__dict__["layer"](own, *arguments, **keywords)
        result = result if isinstance(result, torch.Tensor) else result[0]
        if own.requires_grad:
            own.register_hook(self._marking("end", NEXT))
        del own, hidden_states
        named[record.block_of(result)] = RESULT
        record.mark("out")
        if result.requires_grad:
            result.register_hook(self._marking("back", GRADIENT))
        return result

    def _marking(self, mark: str, block: int) -> Callable[[torch.Tensor], None]:
        record, named = self.record, self.named
        assert record is not None  # noqa: S101 - set for each pass

        def hook(gradient: torch.Tensor) -> None:
            named[record.block_of(gradient)] = block
            record.mark(mark)

        return hook


@contextmanager
def _materialized(decoder: Any, layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Zeros for what stands on the meta device, of the layer and of what is not in any layer; taken away again.

    A large tensor of zeros takes no memory until it is written to.
    """
    in_layers = {id(module) for module in decoder.layers.modules()}
    mine = [*layer.modules(), *(module for module in decoder.modules() if id(module) not in in_layers)]
    undo: list[tuple[dict[str, Any], str, Any]] = []
    tensors: dict[str, Any]
    for module in mine:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                undo.append((tensors, name, tensor))  # type: ignore[arg-type]
                tensors[name] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    # as a run does once the weights are there
    own = [module for module in (layer, getattr(decoder, "norm", None)) if undo and module is not None]
    replaced = [replace(module) for module in own for replace in (quicken_norms, lean_mlps)]
    try:
        yield
    finally:
        for forwards in replaced:
            forwards.remove()
        if undo:
            for module in layer.modules():
                if isinstance(module, AdaptedModule):
                    module.release()
        for tensors, name, tensor in undo:
            tensors[name] = tensor
