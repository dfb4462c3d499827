"""Everything that a run needs, put together once: data, model, adapters, phases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from eulerforge.api import InjectionReport
from eulerforge.config.schema import RunConfig
from eulerforge.data.batches import pad_id
from eulerforge.data.packing import Layout, Lines, token_budget
from eulerforge.data.parity import Parity, check_parity
from eulerforge.data.prepared import Datasets, build_dataset
from eulerforge.data.render import dated
from eulerforge.errors import UsageError
from eulerforge.models.device import pick_device, slow_products
from eulerforge.models.load import load_model, load_tokenizer
from eulerforge.models.processor import product_key
from eulerforge.models.sizes import gib
from eulerforge.models.soundness import refuse_ids_beyond
from eulerforge.models.source import BaseSource, resolve_source, revision_of
from eulerforge.models.stored import StoredReport, widen_trained
from eulerforge.training.compiled import compile_layers
from eulerforge.training.coverage import inject_and_plan, rehearse
from eulerforge.training.estimated import Estimated, NoEstimate, from_config, from_model
from eulerforge.training.gated import lean_mlps
from eulerforge.training.headcheck import check_head
from eulerforge.training.isolation import Isolation
from eulerforge.training.layouts import plan_layout, saved_line
from eulerforge.training.limits import Room
from eulerforge.training.memory import Shortage, refuse_beyond_memory
from eulerforge.training.norms import quicken_norms
from eulerforge.training.phases import PhasePlan
from eulerforge.training.prefix import FrozenPrefix, first_trained_layer
from eulerforge.training.recompute import Kept, every_of, recompute_layers
from eulerforge.training.replaced import Replaced

if TYPE_CHECKING:
    from eulerforge.plugins import Registry

Say = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Run:
    """A run that is ready to train; ``phases`` knows which parameters train when.

    ``datasets`` is None only when it was assembled without data.
    """

    config: RunConfig
    model: Any
    tokenizer: Any
    source: BaseSource
    backbone: str
    report: InjectionReport
    groups: dict[str, tuple[str, ...]]
    phases: PhasePlan
    datasets: Any
    device: torch.device
    dtype: torch.dtype
    out: Path
    layout: Layout
    isolation: Isolation
    norms: Replaced
    mlps: Replaced
    kept: Kept
    prefix: FrozenPrefix | None = None
    stored: StoredReport | None = None
    estimated: Estimated | NoEstimate | None = None
    warnings: tuple[str, ...] = ()

    @property
    def packing_facts(self) -> dict[str, Any]:
        """How rows are laid out and kept apart, for whoever reads a file."""
        return {**self.isolation.to_json(self.layout.packing), "share_prefixes": self.layout.share_prefixes}

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    @contextmanager
    def forward(self, lines: Lines) -> Iterator[None]:
        """What a training forward pass over these rows runs in."""
        reads: AbstractContextManager[None] = nullcontext()
        if self.prefix is not None:
            reads = self.prefix.reading(self.layout.documents(self.datasets.train, lines), self.device)
        with self.kept.forward(self.model), reads:
            yield

    @property
    def eval_batch_size(self) -> int:
        return self.config.eval_batch_size

    @property
    def eval_layout(self) -> Layout:
        """How held-out rows are cut: packed if the training is, neighbours in length together, longest first."""
        return attrs.evolve(
            self.layout,
            packing="off" if self.layout.packing == "off" else "flat",
            batch_size=self.eval_batch_size,
            token_budget=token_budget(self.config, self.device, rows=self.eval_batch_size),
            by_length=True,
        )


def refuse_many_processes() -> None:
    """Raises UsageError under torchrun: every process would train the same run over the same folder."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise UsageError(
            f"WORLD_SIZE is {size}, but training with several processes is not there yet",
            hint="start it without torchrun or accelerate; a larger training.grad_accum_steps gives the same batch",
        )


def assemble(
    config: RunConfig,
    registry: Registry,
    *,
    out: Path,
    need_data: bool = True,
    estimates: bool = False,
    began: str | None = None,
    found: Callable[[BaseSource], None] = lambda source: None,
    shortage: Shortage | None = None,
    say: Say = lambda text: None,
) -> Run:
    """Read the data, load the model, inject, resolve the phases: what is cheap to check comes first.

    ``found`` is called once the base's folder is known, before anything of it is loaded. With ``estimates`` the run
    says what memory it will take before it is loaded, and knows it afterwards. ``shortage`` learns how it may be asked.
    ``began`` is the day that a chat template is told, of a run that goes on.

    Raises:
        EulerForgeError: the first thing that is wrong, as the part that found it says it.
    """
    refuse_many_processes()
    device = pick_device(config.device)
    prepare_torch(config, device)
    rehearsed = rehearse(config, registry)
    if isinstance(rehearsed, str):
        say(rehearsed)
    else:
        say(f"from config.json: {rehearsed.lines()[0]}")
        refuse_beyond_memory(rehearsed.parameter_count, device)
    source = resolve_source(config.model_name, revision=config.model.revision, say=say)
    found(source)
    config = attrs.evolve(config, model=attrs.evolve(config.model, revision=revision_of(source, config.model.revision)))
    tokenizer: Any = None
    datasets: Datasets | None = None
    parity: Parity | None = None
    if need_data or config.data.path:
        tokenizer = load_tokenizer(config, source=source)
        config = attrs.evolve(config, data=dated(config.data, tokenizer, began))
        if began and config.data.date == began:
            say(f"the chat template writes the date: rows are rendered as of {began}, when this run began")
        datasets = build_dataset(config.data, tokenizer, seed=config.seed)
        for line in datasets.report.lines():
            say(line)
        parity = check_parity(datasets, config.data, tokenizer)
        say(parity.line())
    wanted = estimates or config.training.gradient_checkpointing == "auto"
    room = Room.now(device)
    estimated = from_config(config, registry, source.folder, datasets, device) if wanted else None
    if estimated is not None:
        say(estimated.line())
    if shortage is not None:
        early = estimated
        shortage.estimate = lambda: early or from_config(config, registry, source.folder, datasets, device, room)
    loaded = load_model(config, device=device, tokenizer=tokenizer, source=source, say=say)
    injected, groups, phases = inject_and_plan(config, registry, loaded.model)
    stored = loaded.stored
    if stored is not None and (stored := widen_trained(loaded.model, phases.trained_names, stored)):
        say(stored.line())
    warnings = [*injected.warnings, *phases.warnings, *(parity.warnings if parity is not None else ())]
    rows = int(loaded.model.get_input_embeddings().weight.shape[0])
    highest = datasets.train.highest_id if datasets is not None else None
    if beyond := refuse_ids_beyond(rows, loaded.tokenizer, highest=highest, name=loaded.source.name):
        warnings.append(beyond)
    if config.model.trust_remote_code:
        warnings.append("model.trust_remote_code is on: Python code that comes with the model has run in this process")
    if loaded.dtype == torch.float16:
        key = product_key(config.model.load_precision)
        warnings.append(f"fp16 gradients can underflow in the base; bf16 or fp32 are safer ({key})")
    if getattr(loaded.model.config.get_text_config(), "output_router_logits", False):
        warnings.append("config.json asks for the routers' load-balancing loss (output_router_logits): it is not added")
    if slow := slow_products(config.model.load_precision, device):
        warnings.append(slow)
    layout, isolation = plan_layout(config, registry, loaded.model, injected, pad_id(loaded.tokenizer), device)
    say(isolation.line(layout.packing))
    if datasets is not None and (saved := saved_line(layout, datasets.train, config)):
        say(saved)
    if unchecked := check_head(loaded.model):
        warnings.append(unchecked)
    norms, mlps = quicken_norms(loaded.model), lean_mlps(loaded.model)
    say(norms.line())
    if mlps.count or mlps.left:
        say(mlps.line())
    layers = list(injected.adapter.find_transformer_layers(loaded.model))
    prefix = _prefix(loaded.model, phases, datasets, say) if config.training.cache_frozen_prefix else None
    if isinstance(estimated, NoEstimate):
        estimated = from_model(
            config, loaded.model, layers, phases, layout, source.folder, datasets, device, room, stored
        )
        say(f"with the weights there: {estimated.line()}")
    if isinstance(estimated, NoEstimate):
        warnings.append(estimated.line())
    kept = _kept(config, loaded.model, layers, estimated, device, say)
    if config.training.compile:
        warnings += compile_layers(layers, device)
    return Run(
        config=config,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        source=loaded.source,
        backbone=injected.backbone.name,
        report=injected.report,
        groups=groups,
        phases=phases,
        datasets=datasets,
        device=device,
        dtype=loaded.dtype,
        stored=stored,
        out=out,
        layout=layout,
        isolation=isolation,
        norms=norms,
        mlps=mlps,
        kept=kept,
        prefix=prefix,
        estimated=estimated,
        warnings=tuple(warnings),
    )


def _prefix(model: Any, phases: PhasePlan, datasets: Datasets | None, say: Say) -> FrozenPrefix | None:
    """Room for what the frozen layers give for every row; None without rows."""
    first = first_trained_layer(model, phases.trained_names)
    if datasets is None:
        return None
    width, tokens = int(model.config.get_text_config().hidden_size), int(datasets.train.lengths.sum())
    prefix = FrozenPrefix(model.get_decoder(), first, tokens=tokens, width=width, dtype=model.dtype)
    prefix.prove(model)
    say(f"layers 0 to {first - 1} are computed once per row: {gib(prefix.bytes)} on the disk")
    return prefix


def _kept(
    config: RunConfig,
    model: Any,
    layers: list[Any],
    estimated: Estimated | NoEstimate | None,
    device: torch.device,
    say: Say,
) -> Kept:
    """Which layers are computed again, and whether activations leave the GPU."""
    training = config.training
    if training.offload_activations and device.type != "cuda":
        raise UsageError(
            f"activations are in the main memory already: the device is {device}",
            key="training.offload_activations",
            hint="--set training.offload_activations=false; training.gradient_checkpointing=all needs less memory",
        )
    every = every_of(training.gradient_checkpointing)
    if every is None:
        assert estimated is not None  # noqa: S101 - auto always asks for it
        every = estimated.every
        say(estimated.choice())
    recompute_layers(model, layers, every)
    return Kept(every=every, offload=training.offload_activations)


def prepare_torch(config: RunConfig, device: torch.device) -> None:
    """Threads and deterministic kernels, as the preset asks for them."""
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
