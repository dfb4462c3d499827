"""What an export says of itself: to the caller, and in the receipt that lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

import eulerforge
from eulerforge.errors import Problem
from eulerforge.export.audit import ExportAudit
from eulerforge.export.destination import RECEIPT, files_of
from eulerforge.export.rundir import TrainedRun


@attrs.frozen(kw_only=True)
class Written:
    """What an export wrote."""

    folder: Path
    format: str
    dtype: str
    tensors: tuple[str, ...]
    files: tuple[str, ...]
    size: int
    audit: ExportAudit
    warnings: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("format", "dtype", "files", "size")}
        return {
            "folder": str(self.folder),
            **fields,
            "tensors": len(self.tensors),
            "audit": self.audit.to_json(),
            "warnings": [problem.to_json() for problem in self.warnings],
        }


def write_receipt(
    staging: Path, run: TrainedRun, format: str, audit: ExportAudit, warnings: tuple[Problem, ...], **facts: Any
) -> None:
    """The last file of an export: what it was made of, ``facts``, how it was judged, and the files beside it."""
    receipt = {
        "schema": 1,
        "format": format,
        "eulerforge": eulerforge.__version__,
        "run": run.folder.name,
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "base": {
            "model_name": run.source.name,
            "kind": run.source.kind,
            "trained_as": run.run.model.load_precision.mode,
            **run.weights,
        },
        **facts,
        "audit": audit.to_json(),
        "warnings": [problem.to_json() for problem in warnings],
        "files": files_of(staging),
    }
    (staging / RECEIPT).write_text(json.dumps(receipt, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
