"""What a run is made of, and what of it may change between its parts.

Three kinds of keys. *Fixed* ones decide the numbers that a run computes (data, base weights, seed, adapters, schedule,
batch cut, plugin versions): a change is refused by name, unless it is allowed, and then it is recorded. *Soft* ones
are the machine and the libraries: a change is said and recorded, since the bits may differ. *Free* ones (how often to
log, save and validate, what to keep) change nothing that is trained, and nothing is said.
New keys are fixed until they are listed here as free.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from eulerforge.config.schema import DataConfig, RunConfig
from eulerforge.config.structure import leaf_keys
from eulerforge.errors import CheckpointError, Problem, UsageError
from eulerforge.models.device import DTYPE_NAMES

if TYPE_CHECKING:
    from eulerforge.plugins import Registry
    from eulerforge.plugins.records import PluginRecord
    from eulerforge.training.assemble import Run

FREE_TRAINING = (
    "log_steps",
    "save_steps",
    "val_steps",
    "gradient_checkpointing",
    "offload_activations",
    "threads",
    "max_skipped_steps",
)
"""Keys of ``training`` that do not change what is trained; ``threads`` is soft, through the receipt."""

STEPS_KEY = "training.max_train_steps"
HELD_OUT = "data.validation"
ROWS = ("data", HELD_OUT)
"""The facts that stand for the keys of ``data`` that say which rows are read and how they become tokens."""
BASE = ("model_name", "model_name.config")
"""The facts of the base model."""
PLACES = ("injection", "training.phases")
"""Keys that may change which tensors train, or their shapes."""
SOFT = ("eulerforge", "python", "libraries", "device", "threads")


def identity(run: Run, registry: Registry, weights: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """The fixed facts of a run, by the key that a user would change them with."""
    config, validation = run.config, run.datasets.validation
    training = attrs.asdict(config.training)
    for name in (*FREE_TRAINING, "max_train_steps", "num_epochs"):
        training.pop(name, None)
    training["phases"] = [[phase.step, list(phase.groups)] for phase in run.phases.phases]
    # as it came out, whatever was asked for: the cut decides the order of the sums
    training["tokens_per_micro_batch"] = run.layout.token_budget
    precision = attrs.asdict(config.model.load_precision)
    computed = DTYPE_NAMES.get(run.dtype, str(run.dtype))
    if precision["mode"] == "auto":  # whatever it is stored as, it has the numbers of this
        precision["mode"] = computed
    # an earlier version recorded auto where nothing is stored in another precision
    plain = precision["mode"] == computed
    precision["compute_dtype"] = "auto" if plain else computed
    # a permission changes no number
    del precision["allow_unquantized_experts"]
    flat: dict[str, Any] = {
        "data": run.datasets.train.sha256,
        HELD_OUT: validation.sha256 if validation is not None else None,
        "data.packing": run.layout.packing,
        "data.share_prefixes": run.layout.share_prefixes,
        "model_name": weights["sha256"],
        "model_name.config": weights.get("config_sha256"),
        "model.attn_implementation": config.model.attn_implementation,
        "device": run.device.type,
        "seed": config.seed,
        "injection.strategy": config.strategy,
        # the curve of the learning rate ends at the last step; without a curve a run may be made longer or shorter
        STEPS_KEY: total_steps if config.training.scheduler != "constant" else None,
    }
    flat |= {f"plugins.{record.qualified_name}": record.version for record in used_plugins(run, registry)}
    flat |= _flatten("model.load_precision", precision) | _flatten("training", training)
    return flat | _flatten("injection", attrs.asdict(config.injection))


def used_plugins(run: Run, registry: Registry) -> list[PluginRecord]:
    """The plugins that gave a run its backbone, its strategy and its phase groups."""
    records = [registry.owner(registry.backbone(run.backbone)), registry.owner(registry.strategy(run.config.strategy))]
    records += [registry.owner(spec) for spec in registry.phase_groups() if set(spec.groups) & set(run.phases.groups)]
    return list({record.qualified_name: record for record in records}.values())


def derived_keys(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """The facts that come from other keys because nobody set them, each with the keys that it follows."""
    training, precision = config.training, config.model.load_precision
    found: dict[str, tuple[str, ...]] = {}
    if training.tokens_per_micro_batch is None:
        found["training.tokens_per_micro_batch"] = ("training.batch_size", "data", "device")
    if not training.phases:
        found["training.phases"] = ("injection",)
    if training.max_train_steps is None:
        found[STEPS_KEY] = ("data", "training.batch_size", "training.grad_accum_steps")
    if precision.mode == "auto":
        found["model.load_precision.mode"] = ("device",)
    if precision.compute_dtype == "auto":
        found["model.load_precision.compute_dtype"] = ("device", "model.load_precision.mode")
    return found


def accept_changes(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    allowed: Sequence[str],
    *,
    derived: Mapping[str, Sequence[str]] | None = None,
    fits: Callable[[], bool] = lambda: True,
    hint: str | None = None,
) -> list[dict[str, Any]]:
    """The fixed facts that changed, each covered by a key in ``allowed``; a key covers those below it too.

    ``derived`` maps a fact that nobody set to the keys that it follows: it goes the way of theirs.
    ``fits`` says whether the checkpoint's tensors have their places in the model: else no permission could help. Only
    a refusal that it might change asks, because it reads a file.
    ``hint`` takes the place of what a ``--resume`` could do.

    Raises:
        CheckpointError: something else has changed; every change is named.
        UsageError: ``allowed`` holds what is no key of a run.
    """
    # a fact that the checkpoint does not know was not recorded by the version that wrote it
    changed = [key for key in now if key in saved and saved[key] != now[key]]
    changed += [key for key in saved if key not in now]
    for key in allowed:
        if not any(_covers(key, known) for known in {**saved, **now}):
            near = difflib.get_close_matches(key, list({**saved, **now}), n=1)
            raise UsageError(
                f"--allow-changed {key}: a run has no such key to hold on to",
                hint=f"did you mean {near[0]}?" if near else "give the key that the refused --resume named",
            )
    refused = [key for key in changed if not any(_covers(given, key) for given in allowed)]
    for key, sources in (derived or {}).items():
        if key in refused and any(_covers(source, other) for source in sources for other in changed if other != key):
            refused.remove(key)
    if refused:
        misfits = any(_covers(place, key) for place in PLACES for key in refused) and not fits()
        raise CheckpointError.of(
            [
                Problem(
                    key=key,
                    message=f"was {shown(saved.get(key))} at the newest checkpoint and is {shown(now.get(key))} now",
                    hint=hint or _way_on(key, misfits),
                )
                for key in refused
            ]
        )
    return [{"key": key, "was": saved.get(key), "now": now.get(key)} for key in changed]


def soft_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What of the machine and the libraries differs between two receipts."""
    was = _flatten("", {key: old.get(key) for key in SOFT if key in old})
    now = _flatten("", {key: new.get(key) for key in SOFT if key in old})
    # a library that only one part imported had no part in the other
    return [{"key": key, "was": was[key], "now": now[key]} for key in was if key in now and was[key] != now[key]]


def shown(value: Any) -> str:
    """A value as an error names it; hashes are cut."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)


def _way_on(key: str, misfits: bool) -> str:
    back, anew = "put it back to go on with --resume", "start anew with --overwrite or another --output-dir"
    if misfits and any(_covers(place, key) for place in PLACES):
        return f"{back} (the checkpoint's adapters do not fit those of now), or {anew}"
    return f"{back}, or go on all the same with --allow-changed {key}, or {anew}"


def _covers(given: str, key: str) -> bool:
    of_layout = ("data.packing", "data.share_prefixes")
    if key in ROWS and given in leaf_keys(DataConfig, "data.") and given not in of_layout:
        return True
    return key == given or key.startswith(f"{given}.")


def _flatten(prefix: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            flat |= _flatten(name, value)
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat
