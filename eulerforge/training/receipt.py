"""receipt.json: what exactly a run was made of, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eulerforge import __version__
from eulerforge.config.atomic import sha256_of
from eulerforge.models.device import DTYPE_NAMES
from eulerforge.models.source import HUB_COPIES

if TYPE_CHECKING:
    from eulerforge.plugins import Registry
    from eulerforge.training.assemble import Run

FILE_NAME = "receipt.json"
GENERATION_CONFIG = "generation_config.json"
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "pluggy", "attrs", "cattrs", "numpy", "bitsandbytes")


def base_weights(folder: Path, *, hash_of: Callable[[Path], str] = sha256_of) -> dict[str, Any]:
    """Size and content hash of every safetensors file of a base model, one over all of them, and its config's.

    ``config_sha256`` is of the values of config.json alone, without those that only say who wrote it.
    ``hash_of`` gives a file's content hash.
    """
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hash_of(path)}
        for path in sorted(folder.glob("*.safetensors"))
        # a second form of the weights, which another tool may fetch into the hub's cache
        if not any(fnmatch(path.name, copy) for copy in HUB_COPIES)
    }
    joined = "".join(f"{name}:{facts['sha256']}\n" for name, facts in files.items())
    return {"sha256": _text_hash(joined), "config_sha256": config_sha256(folder), "files": files}


def config_sha256(folder: Path) -> str:
    """Hash of what config.json says of the model: a changed ``rope_theta`` is another base with the same weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    return _text_hash(json.dumps(told, sort_keys=True))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_receipt(run: Run, registry: Registry, weights: dict[str, Any], run_id: str) -> dict[str, Any]:
    """All that is known of how the run is made; two equal runs differ in ``run_id`` and in the machine's names only.

    ``resumed`` is for the parts that follow: at which step each began, and what had changed.
    """
    validation = run.datasets.validation
    return {
        "schema": 1,
        "run_id": run_id,
        "eulerforge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name)) is not None},
        "device": _device_name(run.device),
        "threads": torch.get_num_threads(),
        "dtype": DTYPE_NAMES.get(run.dtype, str(run.dtype)),
        "stored": run.stored.to_json() if run.stored else None,
        "plugins": [
            {"name": record.name, "distribution": record.distribution, "version": record.version}
            for record in registry.records
            if record.status == "ok"
        ],
        "backbone": run.backbone,
        "strategy": run.config.strategy,
        # what the preset or the backbone declared that need not be covered
        "coverage": {"allow_partial": run.report.allow_partial, "gaps": list(run.report.gaps)},
        "seed": run.config.seed,
        "packing": {**run.packing_facts, "token_budget": run.layout.token_budget},
        "norms": {"one_pass": run.norms.count, "left": list(run.norms.left)},
        "gated_mlps": {"keep_two_of_four": run.mlps.count, "left": list(run.mlps.left)},
        "base": {
            "name": run.source.name,
            "kind": run.source.kind,
            **weights,
            "generation_config": (run.source.folder / GENERATION_CONFIG).is_file(),
            "code_of_its_own": run.config.model.trust_remote_code,
        },
        "data": {
            "date": run.config.data.date,
            "train_sha256": run.datasets.train.sha256,
            "validation_sha256": validation.sha256 if validation is not None else None,
            # whether the tokens came from the cache differs between two runs of the same rows
            "report": {key: fact for key, fact in run.datasets.report.to_json().items() if key != "cache"},
        },
        "resumed": [],
    }


def read_receipt(out: Path) -> dict[str, Any]:
    """The receipt of a run folder; empty when there is none that can be read."""
    try:
        found = json.loads((out / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def day_of(receipt: dict[str, Any]) -> str | None:
    """The day that the run's rows were rendered with; None where no template writes one."""
    data = receipt.get("data")
    day = data.get("date") if isinstance(data, dict) else None
    return day if isinstance(day, str) else None


def _version(name: str) -> str | None:
    # a library that is installed but was not imported had no part in the run
    if name not in sys.modules and name == "bitsandbytes":
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
