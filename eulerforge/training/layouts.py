"""How the rows of a run become micro-batches: packed if that is asked for and the model can, which is then proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from eulerforge.config.schema import RunConfig
from eulerforge.data.batches import BatchPlan
from eulerforge.data.packing import Layout, token_budget
from eulerforge.data.tokenized import TokenizedRows
from eulerforge.errors import PluginError
from eulerforge.lora.apply import Injected
from eulerforge.models.load import model_types
from eulerforge.training.isolation import Isolation, isolate, prove

if TYPE_CHECKING:
    from eulerforge.plugins import Registry


def plan_layout(
    config: RunConfig,
    registry: Registry,
    model: Any,
    injected: Injected,
    filler: int,
    device: torch.device,
    *,
    proven: bool = True,
) -> tuple[Layout, Isolation]:
    """The layout, and the isolation that is installed in the model.

    Args:
        filler: the id that fills lines up.
        proven: whether the isolation is proven, for which the model needs its weights.

    Raises:
        RunError: a packed document sees another one.
        PluginError: a backbone declares what its adapter cannot do.
    """
    isolation, by_length, shares = Isolation(), False, False
    if config.data.packing != "off":
        moving = rope_by_length(model.config, config.data.max_length)
        isolation = Isolation(reason=moving) if moving else _isolation(config, registry, model, injected, device)
        if isolation.possible:
            by_length = isolation.pads
            # cached states lie row by row
            asked = config.data.share_prefixes and not config.training.cache_frozen_prefix
            shares = asked and config.data.packing == "flat" and isolation.goes_on
            if proven:
                isolation = attrs.evolve(isolation, leak=prove(model, shares=shares))
    packing = config.data.packing if isolation.possible else "off"
    layout = Layout(
        packing=packing,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        token_budget=token_budget(config, device),
        pad_id=filler,
        by_length=by_length,
        share_prefixes=shares,
        trim=packing != "off",
    )
    return layout, isolation


def saved_line(layout: Layout, rows: TokenizedRows, config: RunConfig) -> str:
    """Which tokens of the first step need not be computed, if any; the tokens of all rows count as trained."""
    if layout.packing == "off":
        return ""
    micro_batches = layout.cut(rows, BatchPlan.of(rows, config).rows_of(0))
    total = sum(int(rows.lengths[index]) for lines in micro_batches for line in lines for index in line)
    with_tails, computed = (
        sum(len(document) for lines in micro_batches for line in one.documents(rows, lines) for document in line)
        for one in (attrs.evolve(layout, trim=False), layout)
    )
    ways = []
    if with_tails < total:
        ways.append("prefixes that rows share are computed once")
    if computed < with_tails:
        ways.append("from a row's last label on nothing is computed")
    return f"{', '.join(ways)}: {computed:,} of the first step's {total:,} tokens are left" if ways else ""


def rope_by_length(config: Any, longest: int) -> str:
    """Why rows of up to ``longest`` tokens are not packed: rotary frequencies that follow the longest row of a call.

    transformers' ``dynamic`` and ``longrope`` change them for the whole call beyond the length of pre-training, so a
    short document beside a long one is computed otherwise than alone, padded or packed. Empty where that cannot be.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for one in [parameters] if "rope_type" in parameters else parameters.values():
        kind = one.get("rope_type")
        border = one.get("original_max_position_embeddings") or text.max_position_embeddings
        if kind in ("dynamic", "longrope") and longest > border:
            return (
                f"its rotary embedding ({kind}) follows the longest row of a micro-batch beyond {border} tokens;"
                f" data.max_length={border} keeps rows independent"
            )
    return ""


def _isolation(
    config: RunConfig, registry: Registry, model: Any, injected: Injected, device: torch.device
) -> Isolation:
    spec, adapter, types = injected.backbone, injected.adapter, model_types(model.config)
    partly = f"backbone {spec.name} knows this model in part"
    if not any(kind in spec.model_types for kind in types):
        # the backbone reaches a part of the model; only the one that knows all of it can say what mixes tokens
        covering = next((found for kind in types if len(found := registry.backbones_for(kind)) == 1), None)
        if covering is None:
            return Isolation(reason=f"{partly}, and none is installed that knows all of it")
        spec = covering[0]
        try:
            adapter = registry.create(spec)
        except PluginError as error:
            return Isolation(reason=f"{partly}, and {spec.name} is broken: {error}")
    keep = config.model.attn_implementation != "auto"
    return isolate(model, spec, adapter, keep_attention=keep, device=device)
