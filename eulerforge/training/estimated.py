"""The memory that a run will take, from its configuration, its model's config.json and its rows: nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from eulerforge.config.schema import RunConfig
from eulerforge.data.packing import Layout
from eulerforge.data.prepared import Datasets
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.errors import EulerForgeError, first_line
from eulerforge.models.device import base_dtype
from eulerforge.models.meta import meta_model
from eulerforge.models.processor import QUANTIZED_MODES
from eulerforge.models.quantize import import_bitsandbytes
from eulerforge.models.quantized import plan_of
from eulerforge.models.sizes import gib
from eulerforge.models.soundness import check_folder, dtypes_of, most_common
from eulerforge.models.stored import StoredReport, keep_stored, storage_of, widen_trained
from eulerforge.training.coverage import inject_and_plan
from eulerforge.training.estimate import Estimate
from eulerforge.training.estimator import Estimator
from eulerforge.training.largest import largest_micro_batch
from eulerforge.training.layouts import plan_layout
from eulerforge.training.limits import Room
from eulerforge.training.peak import MicroBatch
from eulerforge.training.phases import PhasePlan, enter_phase
from eulerforge.training.recompute import SHARE_OF_FREE, choose_every, every_of, in_words

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


@attrs.frozen(kw_only=True, slots=False)
class Estimated:
    """The estimator of the phase that needs most, the largest micro-batch, and how many layers are computed again."""

    estimator: Estimator
    batch: MicroBatch
    wanted: int | None

    @cached_property
    def every(self) -> int:
        """As told, or what ``auto`` chooses."""
        if self.wanted is not None:
            return self.wanted

        def fits(every: int) -> bool:
            found = self.estimator.estimate(self.batch, every)
            return found.step - found.base <= SHARE_OF_FREE * found.free

        return choose_every(fits)

    @cached_property
    def found(self) -> Estimate:
        return self.estimator.estimate(self.batch, self.every)

    @cached_property
    def largest_tokens(self) -> int:
        """Of a micro-batch that fits, in rows of ``data.max_length``."""
        return self.estimator.largest_batch(self.every, longest=self.estimator.config.data.max_length)

    def to_json(self) -> dict[str, Any]:
        """Bytes by part, and the largest micro-batch that fits."""
        longest = self.estimator.config.data.max_length
        batch = {"rows": self.largest_tokens // longest, "tokens": self.largest_tokens, "max_length": longest}
        return {**self.found.to_json(), "largest_batch": batch}

    def line(self) -> str:
        """What is said before the model is loaded."""
        found = self.found
        warning = "" if found.fits else "warning: "
        return (
            f"{warning}estimated from config.json: {gib(found.peak)} at the peak, for a micro-batch of"
            f" {found.tokens:,} tokens; {gib(found.base + found.free)} can be had"
        )

    def shortage(self) -> tuple[str, int | None]:
        """Of a run that failed for memory: what was expected, and the tokens of a micro-batch that should fit."""
        found, longest = self.found, self.estimator.config.data.max_length
        said = (
            f"estimated {gib(found.peak)} at the peak, for a micro-batch of {found.tokens:,} tokens, where"
            f" {gib(found.base + found.free)} could be had"
        )
        if found.fits:
            return f"{said}: less than was needed, or another process or limit took the rest; ", None
        if not self.largest_tokens:
            return f"{said}: not even one row of {longest} tokens fits; ", None
        rows = self.largest_tokens // longest
        return f"{said}: the largest that fits is {self.largest_tokens:,} tokens, {rows} rows; ", self.largest_tokens

    @property
    def packing(self) -> str | None:
        """How rows are laid out, which is not what the preset says where the backbone cannot be packed."""
        return self.estimator.layout.packing

    def has_fused_experts(self) -> bool:
        """Whether the model has experts that no quantized mode reaches."""
        config = self.estimator.config
        return bool(plan_of(self.estimator.model, config.model.load_precision, self.estimator.dtype).experts)

    def choice(self) -> str:
        """What ``auto`` chose, and why."""
        found = self.found
        return (
            f"activations of a micro-batch: {gib(found.activations)}, room for"
            f" {gib(SHARE_OF_FREE * found.free)}: {in_words(self.every)}"
        )


@attrs.frozen
class NoEstimate:
    """Why there is none: what a layer raised."""

    error: Exception

    def line(self) -> str:
        """What is said in the place of the estimate."""
        return f"no estimate of memory: {type(self.error).__name__}: {first_line(self.error)}"

    def shortage(self) -> tuple[str, int | None]:
        """As of an estimate: nothing."""
        return "", None

    packing = None
    """Nobody knows."""

    def has_fused_experts(self) -> bool:
        """Nobody knows."""
        return False

    @property
    def every(self) -> int:
        """What ``auto`` takes where it cannot choose: the least memory."""
        return 1

    def choice(self) -> str:
        """As of an estimate."""
        return f"nobody knows what fits: {in_words(self.every)}; training.gradient_checkpointing=off is faster"


def from_config(
    config: RunConfig,
    registry: Registry,
    folder: Path,
    datasets: Datasets | None,
    device: torch.device,
    room: Room | None = None,
) -> Estimated | NoEstimate:
    """The estimate of a run whose model is in ``folder``; none where only the loaded model can tell.

    ``room`` is what there was before anything of it was loaded; None is what there is now.
    """
    if config.model.load_precision.mode in QUANTIZED_MODES:
        import_bitsandbytes()  # now, so that its own 45 MiB are counted with what the process holds
    try:
        model, stored = _meta_model(config, folder, device)
        injected, _, phases = inject_and_plan(config, registry, model)
        stored = widen_trained(model, phases.trained_names, stored) if stored is not None else None
    except EulerForgeError as error:
        # a strategy that looks at values; what else is wrong was said by the rehearsal of the injection
        if "meta tensor" not in str(error.__cause__):
            raise
        return NoEstimate(error)
    layout, _ = plan_layout(config, registry, model, injected, 0, device, proven=False)
    layers = list(injected.adapter.find_transformer_layers(model))
    return from_model(config, model, layers, phases, layout, folder, datasets, device, room, stored)


def _meta_model(config: RunConfig, folder: Path, device: torch.device) -> tuple[Any, StoredReport | None]:
    """The model without weights, in the precisions that loading would give it."""
    check_folder(folder)
    storage = storage_of(config.model.load_precision, folder, device)
    if storage is None:
        return meta_model(config, base_dtype(config.model.load_precision, device)), None
    model, quantized = meta_model(config, storage.loaded), config.model.load_precision.mode in QUANTIZED_MODES
    return model, keep_stored(model, storage.after(model) or storage, all_wide=quantized)


def from_model(
    config: RunConfig,
    model: Any,
    layers: Sequence[Any],
    phases: PhasePlan,
    layout: Layout,
    folder: Path,
    datasets: Datasets | None,
    device: torch.device,
    room: Room | None = None,
    stored: StoredReport | None = None,
) -> Estimated | NoEstimate:
    """The estimate of a run whose model is injected and isolated, loaded or on the meta device.

    None where a layer cannot be computed by itself on a few tokens, whatever it raises: a plugin's may want weights
    that are not zero, or a layer below it.
    """
    file_dtype = most_common(dtypes_of(folder))
    rows: TokenizedRows | None = datasets.train if datasets is not None else None
    batch = largest_micro_batch(config, layout, rows)
    one_length = rows is not None and len(rows) > 0 and bool((rows.lengths == rows.lengths[0]).all())
    every = every_of(config.training.gradient_checkpointing)

    def estimator() -> Estimator:
        return Estimator(
            config,
            model,
            layers,
            layout=layout,
            device=device,
            file_dtype=file_dtype,
            ever_trained=phases.trained_names,
            one_length=one_length,
            room=room,
            stored=stored,
        )

    made = []
    try:
        for phase in {phase.groups: phase for phase in phases.phases}.values():
            enter_phase(model, phases, phase)
            of_phase = estimator()
            made.append((of_phase.estimate(batch, every or 0).step, of_phase))
        _, most = max(made, key=lambda one: one[0])
        estimated = Estimated(estimator=most, batch=batch, wanted=every)
        estimated.found  # noqa: B018 - what auto chooses computes further kinds of layers
    except Exception as error:  # noqa: BLE001 - an estimate is not worth a run
        return NoEstimate(error)
    return estimated
