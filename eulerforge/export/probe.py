"""Token ids on which two models are compared: the run's held-out rows, or ids that are the same every time."""

from __future__ import annotations

import torch

from eulerforge.config.cachedir import cache_root
from eulerforge.data.prepared import build_dataset
from eulerforge.errors import DataError
from eulerforge.export.rundir import TrainedRun

TOKENS = 1024
"""Tokens that are compared at most."""
LONGEST = 128
"""Tokens of a row that are read: one row's logits at a vocabulary of 250,000 are 128 MB in fp32."""
PROBE = (4, 32)
"""Rows and length of the fixed ids."""


def probe_rows(run: TrainedRun) -> tuple[list[torch.Tensor], str]:
    """Rows of ids, shape (1, T) each, and what they are."""
    if held_out := held_out_ids(run):
        return held_out, "held-out rows"
    size = int(run.model.config.get_text_config().vocab_size)
    ids = torch.randint(size, PROBE, generator=torch.Generator().manual_seed(0))
    return list(ids[:, None]), "fixed token ids"


def held_out_ids(run: TrainedRun) -> list[torch.Tensor]:
    """The first ids of the rows that the run held out; none where it held none out, or its data are gone or changed."""
    config = run.run.data
    if not config.path or run.tokenizer is None:
        return []
    try:
        rows = build_dataset(config, run.tokenizer, seed=run.run.seed, cache_dir=cache_root()).validation
    except DataError:
        return []  # an export needs no data: the receipt says on what the models were compared
    if rows is not None and not run.location.held_out(rows.sha256):
        return []  # some of these may have been trained on
    found: list[torch.Tensor] = []
    left = TOKENS
    for index in range(0 if rows is None else len(rows)):
        ids = torch.from_numpy(rows.row(index)[0][: min(LONGEST, left)].astype("int64"))  # type: ignore[union-attr]
        found.append(ids[None])
        left -= len(ids)
        if left <= 0:
            break
    return found
