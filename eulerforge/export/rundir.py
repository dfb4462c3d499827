"""A finished or half-finished run, opened again: its preset, its base, its adapters, all checked against each other.

Opening has two steps, so that the base can be measured before the adapters are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from eulerforge.api import InjectionReport
from eulerforge.config import load_run_config
from eulerforge.config.schema import RunConfig
from eulerforge.errors import CheckpointError
from eulerforge.lora.apply import apply_injection
from eulerforge.models.device import pick_device
from eulerforge.models.load import load_model
from eulerforge.models.soundness import check_folder
from eulerforge.models.source import BaseSource, resolve_source
from eulerforge.training.checkpoint import ADAPTER_FILE, load_trained
from eulerforge.training.identity import HELD_OUT
from eulerforge.training.manifest import STATE_FILE, TrainState, read_state, verify
from eulerforge.training.outdir import CONFIG_FILE, FINAL, went_on_to
from eulerforge.training.receipt import base_weights
from eulerforge.training.rotation import checkpoint_folders, latest_complete

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


@attrs.frozen(kw_only=True)
class Location:
    """A checkpoint on disk and the run that it belongs to.

    ``injection`` is the injection report of the training, as its manifest keeps it.
    ``notes`` is what the user should hear of the choice.
    """

    folder: Path
    checkpoint: Path
    state: TrainState
    injection: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def held_out(self, sha256: str) -> bool:
        """Whether the run held out the rows of this hash; one that recorded no hash is believed."""
        return bool(self.state.identity.get(HELD_OUT, sha256) == sha256)


@attrs.frozen(kw_only=True)
class OpenBase:
    """A run's base model as it was before training; ``weights`` holds its files' sizes and hashes."""

    location: Location
    run: RunConfig
    model: Any
    tokenizer: Any
    source: BaseSource
    weights: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype


@attrs.frozen(kw_only=True)
class TrainedRun(OpenBase):
    """A run's model with its adapters.

    ``trained_base`` holds the base tensors that the run trained, by their names in the model without wrappers; the
    live model has them already.
    """

    report: InjectionReport
    trained_base: Mapping[str, torch.Tensor]
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.location.folder

    @property
    def checkpoint(self) -> Path:
        return self.location.checkpoint

    @property
    def step(self) -> int:
        return self.location.state.step


def open_run(
    path: Path,
    *,
    registry: Registry,
    device: str | None = None,
    checkpoint: int | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainedRun:
    """A run's model with its adapters loaded, in eval mode on ``device`` (None: the preset's own).

    Args:
        path: a run's folder, a ``checkpoint-N`` folder or a ``final`` folder.
        checkpoint: a step; without it ``final`` is taken, else the newest complete checkpoint.

    Raises:
        CheckpointError: nothing complete is there, or it is damaged, or it does not fit its own preset.
        EulerForgeError: the preset, the base or a plugin is missing or wrong.
    """
    return attach(open_base(locate(path, checkpoint, say=say), registry=registry, device=device, say=say), registry)


def locate(path: Path, checkpoint: int | None = None, *, say: Callable[[str], None] | None = None) -> Location:
    """Find the checkpoint that is meant and check its files against its manifest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no run folder {path}", hint="give the folder that eulerforge train wrote")
    notes: tuple[str, ...] = ()
    if (path / CONFIG_FILE).is_file():
        folder, chosen, notes = path, *_choose(path, checkpoint, say)
    elif (path.resolve().parent / CONFIG_FILE).is_file():
        if checkpoint is not None:
            raise CheckpointError(
                f"{path} is a checkpoint already", hint=f"give the run's folder {path.parent} with --checkpoint"
            )
        folder, chosen = path.parent if path.name else path.resolve().parent, path
    else:
        raise CheckpointError(
            f"{path} is no run: neither it nor the folder above has {CONFIG_FILE}",
            hint="give the folder that eulerforge train wrote, or a checkpoint in it",
        )
    # the base with the adapters, which final may hold too, is read by nothing here and may have been deleted
    only = (ADAPTER_FILE, STATE_FILE) if chosen.resolve().name == FINAL else None
    injection = verify(chosen, only=only).get("injection", {})
    return Location(folder=folder, checkpoint=chosen, state=read_state(chosen), injection=injection, notes=notes)


def open_base(
    location: Location,
    *,
    registry: Registry,
    device: str | None = None,
    found: Callable[[BaseSource], None] = lambda source: None,
    say: Callable[[str], None] | None = None,
) -> OpenBase:
    """Load the preset and the base of a run; no adapter is in the model yet.

    ``device`` None is the preset's own. ``found`` is called once the base's folder is known, before its weights are
    read.

    Raises:
        CheckpointError: the base's files are not those that the run was trained on.
        EulerForgeError: the preset, the base or a plugin is missing or wrong.
    """
    run = load_run_config(str(location.folder / CONFIG_FILE), [], strategy_configs=registry.strategy_config).run
    if run.model.trust_remote_code and say is not None:
        say(f"warning: {location.folder / CONFIG_FILE} turns model.trust_remote_code on: the model's own code runs now")
    where = pick_device(device or run.device, hint="--device cpu")
    source = resolve_source(run.model_name, revision=run.model.revision, say=say)
    check_folder(source.folder)
    found(source)
    loaded = load_model(run, device=where, source=source, say=say)
    weights = base_weights(loaded.source.folder)
    trained_on = location.state.identity.get("model_name", weights["sha256"])
    if weights["sha256"] != trained_on:
        raise CheckpointError(
            f"{loaded.source.name} is not the base that the run was trained on: its weights have changed",
            key="model_name",
            hint="put the old weights back, or train again",
        )
    if weights["config_sha256"] != location.state.identity.get("model_name.config", weights["config_sha256"]):
        raise CheckpointError(
            f"{loaded.source.name} is not the base that the run was trained on: its config.json has changed",
            key="model_name.config",
            hint="put the old config.json back, or train again",
        )
    return OpenBase(
        location=location,
        run=run,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        source=loaded.source,
        weights=weights,
        device=where,
        dtype=loaded.dtype,
    )


@torch.no_grad()
def attach(base: OpenBase, registry: Registry) -> TrainedRun:
    """Inject into the base as the run did, in place, and load what the run learnt.

    Raises:
        CheckpointError: the checkpoint does not fit the preset beside it.
    """
    model = base.model
    injected = apply_injection(base.run, registry, model)
    _refuse_other_injection(injected.report, base.location)
    trained = load_trained(base.location.checkpoint, model)
    model.eval()
    return TrainedRun(
        **{field.name: getattr(base, field.name) for field in attrs.fields(OpenBase)},
        report=injected.report,
        warnings=injected.warnings,
        trained_base={unwrapped_name(name): tensor for name, tensor in trained.items()},
    )


def unwrapped_name(name: str) -> str:
    """A parameter's name in the model without wrappers: ``gate_proj.base_layer.weight`` is ``gate_proj.weight``."""
    return name.replace(".base_layer.", ".")


def _choose(folder: Path, checkpoint: int | None, say: Callable[[str], None] | None) -> tuple[Path, tuple[str, ...]]:
    if checkpoint is not None:
        chosen = folder / f"checkpoint-{checkpoint}"
        if not chosen.is_dir():
            there = [path.name for path in reversed(checkpoint_folders(folder))]
            raise CheckpointError(
                f"{folder} has no checkpoint-{checkpoint}",
                key="--checkpoint",
                hint=f"it has {', '.join(there)}" if there else "the run saved no checkpoint",
            )
        return chosen, ()
    newest = went_on_to(folder)
    if (folder / FINAL).is_dir() and newest is None:
        return folder / FINAL, ()
    newest = newest or latest_complete(folder, say=say)
    if newest is None:
        raise CheckpointError(
            f"{folder} has no {FINAL} and no complete checkpoint", hint="train on with eulerforge train --resume"
        )
    return newest, (f"the run is not finished: {newest.name} is used, its newest complete checkpoint",)


def _refuse_other_injection(report: InjectionReport, location: Location) -> None:
    """The tensors' shapes do not show a changed alpha; the report in the manifest does."""
    then = {(site["path"], site["r"], site["scaling"]) for site in location.injection.get("sites", ())}
    now = {(site.path, site.r, site.scaling) for site in report.sites}
    if then and then != now:
        path = min(then ^ now)[0]
        raise CheckpointError(
            f"{location.folder / CONFIG_FILE} injects something else than the run was trained with, {path} first",
            key="injection",
            hint="put the file back as the training wrote it, and use the plugin's version from then",
        )
