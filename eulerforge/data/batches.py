"""Which rows a step trains on, and those rows as tensors.

Notable: the order is a function of the seed and the step alone, so a resumed run needs no saved position, and the rows
of a step are the same however batch_size x grad_accum_steps is cut. The mask comes from lengths, never from ids: where
the padding token is the EOS token, the EOS of a row stays trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from eulerforge.data.rows import IGNORED
from eulerforge.data.tokenized import TokenizedRows

if TYPE_CHECKING:
    import torch

    from eulerforge.config.schema import RunConfig, TrainingConfig
    from eulerforge.data.packing import Segments


@attrs.frozen(kw_only=True)
class Batch:
    """B rows of T tokens: right-padded ones, or packed ones; ``tokens`` counts real tokens.

    Packed rows have no attention mask; ``position_ids`` begins at 0 in each row, ``segments`` says where documents lie.
    ``label_at`` (N,) are the flattened positions from which a label is predicted and ``next_labels`` (N,) those labels,
    known from the start, because a GPU would have to be waited for to find them among (B, T).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    label_at: torch.Tensor
    next_labels: torch.Tensor
    tokens: int
    position_ids: torch.Tensor | None = None
    segments: Segments | None = None

    @property
    def label_tokens(self) -> int:
        """How many tokens the loss is a sum over."""
        return len(self.next_labels)


class BatchPlan:
    """The rows of each optimizer step, counted from 0, over as many epochs as are asked for."""

    def __init__(self, rows: TokenizedRows, batch_size: int, grad_accum_steps: int, seed: int) -> None:
        if not len(rows):
            raise ValueError("a batch plan needs at least one row")
        self.rows = rows
        self.batch_size = batch_size
        self.grad_accum_steps = grad_accum_steps
        self.seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    @classmethod
    def of(cls, rows: TokenizedRows, config: RunConfig) -> BatchPlan:
        """The plan of a run."""
        return cls(rows, config.training.batch_size, config.training.grad_accum_steps, config.seed)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that see every row ``epochs`` times; the last step may begin the next epoch."""
        return max(1, math.ceil(len(self.rows) * epochs / self.rows_per_step - 1e-9))

    def total_steps(self, training: TrainingConfig) -> int:
        """The step with which a run ends."""
        return training.max_train_steps or self.steps_for(training.num_epochs or 1.0)

    def epoch_at(self, step: int) -> float:
        """How many times the rows have been gone through when ``step`` begins."""
        return step * self.rows_per_step / len(self.rows)

    def rows_of(self, step: int) -> list[int]:
        """The row indices of a step; how they are cut into micro-batches is ``data/packing.py``'s."""
        first = step * self.rows_per_step
        return [self._row_at(position) for position in range(first, first + self.rows_per_step)]

    def step_rows(self, step: int) -> list[list[int]]:
        """A step's rows in lists of ``batch_size``, of which there are ``grad_accum_steps``."""
        picked = self.rows_of(step)
        return [picked[at : at + self.batch_size] for at in range(0, len(picked), self.batch_size)]

    def _row_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.rows))
            self._epoch = epoch
        return int(self._order[place])


def pad_id(tokenizer: Any) -> int:
    """The id that fills a row; masked everywhere, so any valid one does."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def collate(rows: TokenizedRows, indices: Sequence[int], pad_id: int, device: torch.device | str) -> Batch:
    """The rows at ``indices`` as one batch on ``device``; tensors are (B, T) int64."""
    import torch

    picked = [rows.row(index) for index in indices]
    shape = (len(picked), max(len(ids) for ids, _ in picked))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for line, (ids, labelled) in enumerate(picked):
        input_ids[line, : len(ids)] = ids
        attention_mask[line, : len(ids)] = 1
        labels[line, : len(ids)] = np.where(labelled != 0, ids.astype(np.int64), IGNORED)
    labels[:, 0] = IGNORED
    label_at, next_label = next_labels(labels, device)
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention_mask).to(device),
        label_at=label_at,
        next_labels=next_label,
        tokens=int(attention_mask.sum()),
    )


def next_labels(labels: npt.NDArray[np.int64], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """``label_at`` and ``next_labels`` of a Batch whose labels, not shifted and -100 elsewhere, are these (B, T)."""
    import torch

    line, place = np.nonzero(labels[:, 1:] != IGNORED)
    at = torch.from_numpy(line * labels.shape[1] + place)
    return at.to(device), torch.from_numpy(labels[line, place + 1]).to(device)
