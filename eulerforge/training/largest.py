"""The micro-batches of a run by size: the largest that it will meet."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from eulerforge.data.batches import BatchPlan
from eulerforge.data.packing import Layout
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.training.onelayer import CHUNK
from eulerforge.training.peak import MicroBatch

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig

STEPS_LOOKED_AT = 64


def largest_micro_batch(config: RunConfig, layout: Layout, rows: TokenizedRows | None) -> MicroBatch:
    """The largest micro-batch of the run, or of ``STEPS_LOOKED_AT`` steps spread over it; without rows, the largest
    that there can be.
    """
    training, packed = config.training, layout.packing != "off"
    if rows is None or not len(rows):
        per_step = training.batch_size * training.grad_accum_steps
        tokens = layout.most_positions(per_step)
        return MicroBatch.of_rows(max(1, tokens // layout.max_length), layout.max_length, packed=packed)
    plan = BatchPlan.of(rows, config)
    total = plan.total_steps(training)
    looked_at = sorted({step * total // STEPS_LOOKED_AT for step in range(STEPS_LOOKED_AT)})
    found = []
    for step in looked_at:
        for lines in layout.cut(rows, plan.rows_of(step)):
            laid_out = layout.documents(rows, lines)
            width = max(sum(map(len, line)) for line in laid_out)
            documents = Counter((len(document), document.first) for line in laid_out for document in line)
            if layout.by_length:
                # documents as rows, and linear attention in chunks
                width = -(-max(map(sum, documents)) // CHUNK) * CHUNK * max(map(len, laid_out))
            found.append(MicroBatch.of_lines(len(lines), width, documents, packed=packed))
    return max(found, key=lambda batch: batch.tokens)
