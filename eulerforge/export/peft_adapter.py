"""The adapters as a PEFT folder: ``adapter_model.safetensors`` and ``adapter_config.json``, with the base's tokenizer.

PEFT states one rank and one alpha and lists the modules that differ from them; the most frequent pair becomes the
stated one, so that a uniform adapter has no exceptions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eulerforge.errors import Problem, UsageError
from eulerforge.export.audit import ExportAudit
from eulerforge.export.basefiles import TOKENIZER_FILES, other_files, read_base_files
from eulerforge.export.destination import RECEIPT, check_destination, staged_export
from eulerforge.export.measure import audit_changes
from eulerforge.export.merged import changes_of, copy_files
from eulerforge.export.rundir import TrainedRun
from eulerforge.export.written import Written, write_receipt
from eulerforge.lora.experts import LoRAExperts
from eulerforge.lora.linear import LoRALinear
from eulerforge.lora.wrap import adapted_modules
from eulerforge.training.checkpoint import tensor_bytes

KEYS = ("text", "multimodal")
MULTIMODAL = "model.language_model."
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@torch.no_grad()
def write_peft(
    run: TrainedRun, out: Path, *, keys: str = "text", overwrite: bool = False, force: bool = False
) -> Written:
    """Write the adapters as PEFT reads them; the base stays where it is.

    Args:
        keys: ``text`` names the modules as the run's own model class does; ``multimodal`` as the multimodal class of
            the same checkpoint does, which vLLM serves.
        force: write what the audit forbids; it is recorded.

    Raises:
        UsageError: the run trained base weights, or an adapter has no PEFT form, or ``out`` cannot be written to.
        RunError: the audit forbids it.
    """
    check_destination(out, run, overwrite=overwrite)
    if run.trained_base:
        raise UsageError(
            f"the run trained {len(run.trained_base)} base tensors, {next(iter(run.trained_base))} first,"
            " which an adapter cannot hold",
            hint="use --format merged",
        )
    modules = dict(adapted_modules(run.model))
    for path, module in modules.items():
        if isinstance(module, LoRAExperts):
            raise UsageError(
                f"{path} has a low-rank path for each of its {module.num_experts} fused experts: PEFT's form of that is"
                " its own, and no server reads it",
                hint="use --format merged",
            )
        if not isinstance(module, LoRALinear):
            raise UsageError(
                f"{path} is a {type(module).__name__}, which PEFT does not know", hint="use --format merged"
            )
    names = module_names(run, tuple(modules), keys)
    layers = {names[path]: module for path, module in modules.items() if isinstance(module, LoRALinear)}
    audit = ExportAudit(layers=audit_changes(changes_of(run), read_base_files(run.source.folder), None))
    audit.refuse(force=force)
    tokenizer = tuple(other_files(run.source.folder, TOKENIZER_FILES))
    notes = _in_the_cache(run)
    tensors: dict[str, torch.Tensor] = {}
    scaling = _common(layers.values()).scaling
    for path, module in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.lora_A.detach().float().cpu().contiguous()
        lora_B = module.lora_B.detach().float().cpu() * (module.scaling / scaling)
        tensors[f"base_model.model.{path}.lora_B.weight"] = lora_B.contiguous()
    size = tensor_bytes(tensors)
    with staged_export(out, peft_bytes(size, run.source.folder), overwrite=overwrite) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_files(run.source.folder, tokenizer, staging)
        config = json.dumps(peft_config(run, layers), indent=2, ensure_ascii=False)
        (staging / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        write_receipt(staging, run, "peft", audit, notes)
    return Written(
        folder=out,
        format="peft",
        dtype="fp32",
        tensors=tuple(sorted(tensors)),
        files=tuple(sorted((CONFIG_FILE, WEIGHTS_FILE, RECEIPT, *map(str, tokenizer)))),
        size=size,
        audit=audit,
        warnings=notes,
    )


def peft_bytes(weights: int, base: Path) -> int:
    """How large the folder of an adapter with so many bytes will be."""
    return weights + sum((base / name).stat().st_size for name in other_files(base, TOKENIZER_FILES))


def _in_the_cache(run: TrainedRun) -> tuple[Problem, ...]:
    """That the base which the adapter names is one that nobody else has."""
    if run.source.kind != "gguf":
        return ()
    return (
        Problem(
            message=f"the adapter's base is what {run.source.name} was converted to, {run.source.folder.resolve()}: it"
            " lies in EulerForge's cache, and without it the adapter has no base",
            hint="keep that folder with the adapter, or write a whole model: eulerforge merge, or --format merged",
        ),
    )


def module_names(run: TrainedRun, paths: tuple[str, ...], keys: str) -> dict[str, str]:
    """Each module's path in the class that the adapter is for.

    Raises:
        UsageError: the base is no multimodal checkpoint that the run opened as a text model.
    """
    if keys == "text":
        return {path: path for path in paths}
    shards = read_base_files(run.source.folder).shards
    names = {path: f"{MULTIMODAL}{path.removeprefix('model.')}" for path in paths}
    for path, name in names.items():
        if path.startswith(MULTIMODAL) or f"{name}.weight" not in shards:
            raise UsageError(
                f"--keys multimodal is for a text model out of a multimodal checkpoint, which {run.source.name} is not",
                key="--keys",
                hint="leave --keys out",
            )
    return names


def peft_config(run: TrainedRun, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    """``adapter_config.json``: full paths as targets, because a bare name may reach modules that were left out.

    All modules have one scaling, which ``lora_B`` makes up for: vLLM knows no ``alpha_pattern`` and computes one
    scaling from ``lora_alpha`` and ``r`` for all.
    """
    common = _common(layers.values())
    rank, alpha, rslora = common.r, float(common.alpha), common.use_rslora
    if any(module.use_rslora != rslora for module in layers.values()):
        raise UsageError("some adapters use rsLoRA and some do not, which PEFT cannot say", hint="use --format merged")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run.source.name if run.source.kind == "hub" else str(run.source.folder.resolve()),
        "revision": run.run.model.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(module.dropout for module in layers.values()),
        "use_rslora": rslora,
        "target_modules": sorted(layers),
        "rank_pattern": {path: m.r for path, m in layers.items() if m.r != rank},
        "alpha_pattern": {path: _alpha(common, m.r) for path, m in layers.items() if m.r != rank},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _common(layers: Iterable[LoRALinear]) -> LoRALinear:
    """One of the layers whose rank, alpha and kind of scaling most have."""
    listed = list(layers)
    kinds = [(layer.r, float(layer.alpha), layer.use_rslora) for layer in listed]
    return listed[kinds.index(Counter(kinds).most_common(1)[0][0])]


def _alpha(common: LoRALinear, rank: int) -> float:
    """With which a module of another rank is scaled as the others are."""
    return common.scaling * (math.sqrt(rank) if common.use_rslora else rank)
