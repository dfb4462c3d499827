"""The measures of an export, taken from the base's files and from the model that was reopened.

Per changed tensor, with W the base file's values, D the trained update, and cast() the export's dtype:

- size: ||D|| / ||W||, Frobenius norms; of a mixture's fused parameter also that of its largest expert.
- lost: ||(cast(W + D) - cast(W)) - D|| / ||D||, how far the update that the file will hold is from the one that was
  trained. It is 1 where nothing of it survives; where W itself does not fit the dtype it may be larger.

Then, on the model that was reopened from what was written: KL divergence, top-1 agreement and the largest difference of
its logits from those of the model with its adapters on.
Notable: the base files' own values are read again, block by block, so a quantized or cast base in memory changes
nothing, and nothing is written before the adapters have passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from safetensors import safe_open

from eulerforge.errors import ModelError
from eulerforge.export.audit import LayerAudit, LogitsAudit, share
from eulerforge.export.basefiles import BaseFiles, Piece
from eulerforge.export.shards import BLOCK
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.linear import LoRALinear
from eulerforge.models.device import DTYPE_NAMES

if TYPE_CHECKING:
    from eulerforge.export.merged import Change


@torch.no_grad()
def audit_changes(
    changes: Iterable[Change], base: BaseFiles, dtype_of: Callable[[torch.dtype], torch.dtype] | None
) -> tuple[LayerAudit, ...]:
    """Measure every change against the base's files.

    Args:
        dtype_of: the dtype in which a tensor of that dtype will be written; None where no weights are.
    """
    return tuple(_audit_change(change, base, dtype_of) for change in changes)


def _audit_change(change: Change, base: BaseFiles, dtype_of: Callable[[torch.dtype], torch.dtype] | None) -> LayerAudit:
    fused = len(change.shape) == 3
    sums = torch.zeros(4, change.shape[0] if fused else 1, dtype=torch.float64)  # update, own, base, error; squared
    fits = sized = True
    dtypes: set[str] = set()
    try:
        pieces: tuple[Piece, ...] = base.pieces_of(change.live, change.shape)
    except ModelError:
        if dtype_of is not None:
            raise
        pieces, sized = (), False  # a base that is stored quantized has names of its own
    for piece, start, part, dtype in _parts(change, base, pieces):
        if not dtype.is_floating_point:
            sized = False
        end = start + (part.shape[0] if part.dim() else 1)
        new = change.rows(piece, part, start, end)
        own = _own_update(change, piece, part, new, start, end)
        delta = own if change.value is None else new - part
        measured = [delta, own, part]
        if dtype_of is not None:
            cast = dtype_of(dtype)
            dtypes.add(DTYPE_NAMES.get(cast, str(cast)))
            rounded = new.to(cast)
            fits = fits and bool(torch.isfinite(rounded).all())
            measured.append((rounded.float() - part.to(cast).float()) - delta)
        where = slice(None) if not fused else slice(start, end) if piece.expert is None else piece.expert
        for row, value in enumerate(measured):
            sums[row, where] += _squares(value, each=fused and piece.expert is None)
    if not pieces and isinstance(change.adapter, LoRALinear):
        sums[:2] = _squares(change.adapter.delta().cpu(), each=False)
    norms = sums.sum(1).sqrt().tolist()
    ratios = [share(delta, weight) for delta, weight in zip(*sums[[1, 2]].sqrt().tolist(), strict=True)]
    adapter = [] if change.adapter is None else [value for _, value in change.adapter.adapter_parameters()]
    return LayerAudit(
        name=change.live,
        delta_norm=norms[0],
        base_norm=norms[2] if sized else None,
        largest_ratio=max(ratios) if sized and adapter else None,
        error_norm=None if dtype_of is None else norms[3],
        dtype="/".join(sorted(dtypes)) or None,
        finite=all(bool(torch.isfinite(value).all()) for value in adapter) and math.isfinite(norms[0]),
        fits=fits,
        untouched=bool(adapter) and norms[1] == 0,
        untouched_experts=int((sums[1] == 0).sum()) if fused and isinstance(change.adapter, LoRAExperts) else 0,
    )


def _parts(
    change: Change, base: BaseFiles, pieces: Sequence[Piece]
) -> Iterable[tuple[Piece, int, torch.Tensor, torch.dtype]]:
    """The tensors of a change as the files hold them, some rows (fp32) at a time: piece, first row, rows, dtype."""
    whole = change.adapter is not None and not change.adapter.merges_in_parts
    for piece in pieces:
        with safe_open(base.folder / base.shards[piece.name], framework="pt") as file:
            stored = file.get_slice(piece.name)
            shape = tuple(stored.get_shape())
            if not shape:
                value = file.get_tensor(piece.name)
                yield piece, 0, value.float(), value.dtype
                continue
            if shape != piece.shape(change.shape):
                # stored quantized: only the update can be measured
                yield piece, 0, torch.zeros(piece.shape(change.shape)), torch.uint8
                continue
            step = shape[0] if whole else max(1, BLOCK // (4 * math.prod(shape[1:]) or 1))
            for start in range(0, shape[0], step):
                part = stored[start : start + step]
                yield piece, start, part.float(), part.dtype


def _own_update(
    change: Change, piece: Piece, part: torch.Tensor, new: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    """What the adapter adds: our own classes add to the weight, so that of a zero weight is exact."""
    if isinstance(change.adapter, (LoRALinear, LoRAExperts)):
        return attrs.evolve(change, value=None).rows(piece, torch.zeros_like(part), start, end)
    return new - part


@torch.no_grad()
def compare_logits(live: Any, written: Any, rows: Sequence[torch.Tensor], source: str) -> LogitsAudit:
    """Hold the logits of the ``written`` model against those of ``live`` on rows of token ids, shape (1, T) each.

    Each model computes on its own device, and one row's logits are in memory at a time.
    """
    kl, agreeing, largest, tokens = 0.0, 0, 0.0, 0
    for ids in rows:
        ours, theirs = (
            model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for model in (live, written)
        )
        largest = max(largest, _number((ours - theirs).abs().max()))
        agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl += _number((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        tokens += ids.shape[1]
    return LogitsAudit(
        kl=max(0.0, kl / tokens) if math.isfinite(kl) else math.inf,
        top1=agreeing / tokens,
        largest_difference=largest,
        tokens=tokens,
        source=source,
    )


def _squares(value: torch.Tensor, *, each: bool) -> torch.Tensor:
    """Sum of squares in fp64 without a copy: of all, or for each entry of the first dimension."""
    dims = tuple(range(1, value.dim())) if each else None
    return torch.linalg.vector_norm(value, dim=dims, dtype=torch.float64) ** 2


def _number(value: torch.Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf
