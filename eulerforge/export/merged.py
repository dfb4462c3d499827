"""The merged model as a plain Hugging Face folder: a copy of the base folder with the changed tensors replaced.

Nothing passes through ``save_pretrained``, so configuration, sharding, dtype and all that the text model does not use
(a vision tower, prediction heads) stay what they were.
A merged weight starts from the base file's own value in fp32, gets the adapter's delta, and is cast once; in which
precision the run had loaded its base does not matter.
A few rows are in memory at a time (one weight, where an adapter wants it whole); a mixture's fused parameters go back
into the tensors of single experts where the files have those.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

from eulerforge.errors import ModelError, Problem, RunError, UsageError, first_line
from eulerforge.export.audit import ExportAudit
from eulerforge.export.basefiles import INDEX, BaseFiles, Piece, other_files, read_base_files
from eulerforge.export.destination import RECEIPT, check_destination, staged_export
from eulerforge.export.measure import audit_changes, compare_logits
from eulerforge.export.probe import probe_rows
from eulerforge.export.rundir import TrainedRun
from eulerforge.export.shards import Rewrite, read_header, write_shard
from eulerforge.export.written import Written, write_receipt
from eulerforge.lora.adapted import AdaptedLinear, AdaptedModule
from eulerforge.lora.wrap import adapted_modules
from eulerforge.models.device import DTYPE_NAMES, DTYPES
from eulerforge.models.experts import stored_shape
from eulerforge.models.processor import QUANTIZED_MODES
from eulerforge.models.soundness import FLOATS
from eulerforge.training.receipt import GENERATION_CONFIG, read_receipt

OTHER_BASE = "merge with the base that the run was trained on"
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 and what older tools wrote


@attrs.frozen(kw_only=True)
class Change:
    """What becomes of one parameter: ``value`` in place of the files' own, then ``adapter`` on top of it.

    ``live`` is its name and ``shape`` its shape in the unwrapped model, ``parameter`` its name in the adapted module.
    """

    live: str
    shape: tuple[int, ...]
    value: torch.Tensor | None = None
    adapter: AdaptedModule | None = None
    parameter: str = "weight"

    def rows(self, piece: Piece, base: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The new rows ``start`` to ``end`` of a tensor of the files, for its own ones: both fp32."""
        index = piece.index(start, end) if base.dim() else ()
        part = base if piece.expert is None else base[None]
        if self.value is not None:
            part = self.value[index].float().cpu()
        if self.adapter is not None:
            part = self.adapter.merged_part(self.parameter, part, index if self.adapter.merges_in_parts else ()).cpu()
        if part.numel() != base.numel():
            raise ModelError(
                f"{self.live}: the adapter gives {tuple(part.shape)}, the file holds {tuple(base.shape)}",
                hint=OTHER_BASE,
            )
        return part.reshape(base.shape)


@torch.no_grad()
def write_merged(
    run: TrainedRun,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    force: bool = False,
) -> Written:
    """Write the merged model as a Hugging Face folder that plain transformers loads.

    Args:
        dtype: ``fp32``, ``fp16`` or ``bf16`` for every floating-point tensor; None keeps each tensor's own.
        overwrite: ``out`` may be an earlier export.
        verify: reopen the folder with transformers before it appears under its name, and compare its logits with those
            of the model with its adapters on.
        force: write what the audit forbids; it is recorded.

    Raises:
        UsageError: ``out`` cannot be written to, or the dtype is not known.
        ModelError: the base has no safetensors, or lacks a tensor that training changed.
        RunError: the audit forbids it, a merged value is not finite in the wanted dtype, or the folder does not load.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is no dtype for an export", hint=f"use one of {', '.join(DTYPES)}")
    check_destination(out, run, overwrite=overwrite)
    base = read_base_files(run.source.folder)
    others = tuple(other_files(base.folder))
    _refuse_quantized(base.folder)
    changed = changes_of(run)
    changes = {piece.name: (change, piece) for change in changed for piece in base.pieces_of(change.live, change.shape)}
    target = None if dtype is None else DTYPES[dtype]
    audit = ExportAudit(
        layers=audit_changes(changed, base, lambda own: target or own),
        quantized=run.run.model.load_precision.mode in QUANTIZED_MODES,
    )
    audit.refuse(force=force)
    with staged_export(out, merged_bytes(base.folder, dtype), overwrite=overwrite) as staging:
        check = _accept if force else _refuse_not_finite
        size = sum(_write_shard(base, file, changes, target, staging, check) for file in base.files)
        if base.index is not None:
            _write_index(base.index, size, staging)
        _copy_others(base.folder, others, staging, target)
        if verify:
            model = verify_loads(staging, trust_remote_code=run.run.model.trust_remote_code)
            audit = attrs.evolve(audit, logits=compare_logits(run.model, model, *probe_rows(run)))
            audit.refuse(force=force)
        warnings = _lost(run, staging)
        facts = {"merged_into": "original base files", "dtype": dtype or "as the base"}
        write_receipt(staging, run, "merged", audit, warnings, **facts, tensors_replaced=sorted(changes))
        files = tuple(sorted(path.name for path in staging.iterdir()))
    return Written(
        folder=out,
        format="merged",
        dtype=facts["dtype"],
        tensors=tuple(sorted(changes)),
        files=files,
        size=size,
        audit=audit,
        warnings=warnings,
    )


def merged_bytes(folder: Path, dtype: str | None) -> int:
    """How large the merged folder of a base will be."""
    base = read_base_files(folder)
    size = sum((folder / name).stat().st_size for name in (*map(Path, base.files), *other_files(folder)))
    if dtype is None:
        return size
    entries = (entry for name in base.files for entry in read_header(folder / name)[0] if entry.is_float)
    return size + sum(math.prod(one.shape) * DTYPES[dtype].itemsize - (one.end - one.start) for one in entries)


def changes_of(run: TrainedRun) -> list[Change]:
    """Every base tensor that the run changed, by its name in the live, unwrapped model."""
    values = dict(run.trained_base)
    found = []
    for path, module in adapted_modules(run.model):
        for parameter in module.changed_parameters:
            name = f"{path}.{parameter}"
            shape = (
                # a quantized weight has a shape of its own
                (module.out_features, module.in_features)
                if isinstance(module, AdaptedLinear)
                else stored_shape(module.base_layer.get_parameter(parameter))
            )
            value = values.pop(name, None)
            found.append(Change(live=name, shape=shape, value=value, adapter=module, parameter=parameter))
    return found + [Change(live=name, shape=tuple(value.shape), value=value) for name, value in values.items()]


def verify_loads(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the folder with plain transformers, refuse one that lacks weights, and give back the model.

    Raises:
        RunError: transformers cannot load it, or would start some tensors as random numbers.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise every kind
        first = first_line(error)
        raise RunError(f"the export does not load: {first}", hint="--no-verify writes it all the same") from error
    wrong = sorted(info["missing_keys"]) + sorted(str(item[0]) for item in info["mismatched_keys"])
    if wrong:
        raise RunError(f"the export lacks {len(wrong)} tensors, {wrong[0]} first", hint="the base folder is incomplete")
    return model.eval()


def _write_shard(
    base: BaseFiles,
    name: str,
    changes: Mapping[str, tuple[Change, Piece]],
    target: torch.dtype | None,
    staging: Path,
    check: Callable[[str, torch.Tensor], None],
) -> int:
    """Write one shard with its changed tensors replaced; give back the bytes of its tensors."""
    rewrites = {}
    for entry in read_header(base.folder / name)[0]:
        found = changes.get(entry.name)
        if found is None and (target is None or not entry.is_float):
            continue
        if entry.dtype not in FLOATS:
            raise ModelError(
                f"{entry.name} is stored as {entry.dtype}, which a merge cannot write",
                hint="give a base in fp32, fp16 or bf16",
            )
        dtype = FLOATS[entry.dtype] if target is None else target
        if found is None:
            rewrites[entry.name] = Rewrite(dtype=dtype)
            continue
        change, piece = found
        if piece.shape(change.shape) != entry.shape:
            raise ModelError(
                f"{change.live} is {change.shape} in the run and {entry.shape} in the base's files, as {entry.name}",
                hint=OTHER_BASE,
            )
        whole = change.adapter is not None and not change.adapter.merges_in_parts
        rewrites[entry.name] = Rewrite(dtype=dtype, change=partial(change.rows, piece), whole=whole)
    return write_shard(base.folder / name, staging / name, rewrites, check)


def _accept(name: str, new: torch.Tensor) -> None:
    """What ``--force`` checks."""


def _refuse_not_finite(name: str, new: torch.Tensor) -> None:
    if not torch.isfinite(new).all():
        raise RunError(
            f"{name} is not finite as {DTYPE_NAMES.get(new.dtype, new.dtype)} after the merge",
            hint="give --dtype fp32 or bf16, or look at the run's loss: the training may have diverged",
        )


def _write_index(index: Mapping[str, Any], size: int, staging: Path) -> None:
    new = {**index, "metadata": {**index.get("metadata", {}), "total_size": size}}
    (staging / INDEX).write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def copy_files(folder: Path, files: Iterable[Path], staging: Path) -> None:
    """Copy files of the base, named by their paths in it."""
    for relative in files:
        if relative.name == RECEIPT:
            continue
        (staging / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / relative, staging / relative)


def _copy_others(folder: Path, others: tuple[Path, ...], staging: Path, target: torch.dtype | None) -> None:
    copy_files(folder, others, staging)
    if target is not None:
        _set_config_dtype(staging / "config.json", str(target).removeprefix("torch."))


def _lost(run: TrainedRun, staging: Path) -> tuple[Problem, ...]:
    """What the base had when the run was trained, and the export does not have."""
    base = read_receipt(run.folder).get("base")
    had = isinstance(base, dict) and base.get("generation_config")
    if not had or (staging / GENERATION_CONFIG).is_file():
        return ()
    return (
        Problem(
            message=f"the base had a {GENERATION_CONFIG} when the run was trained, and has none now: the stop tokens"
            " and sampling settings that it named are not in the export",
            hint=f"put the base's {GENERATION_CONFIG} into the folder",
        ),
    )


def _set_config_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in DTYPE_KEYS:
            if key in part:
                part[key] = dtype
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{folder.name} is stored quantized: a delta that is added to it would be lost in its rounding",
            hint="merge into the base model in fp32, fp16 or bf16",
        )
