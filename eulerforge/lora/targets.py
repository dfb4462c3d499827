"""From a user's keywords to modules: which layers, which places, and what was not reached.

Every strategy that adapts weights shares this; nothing is matched by substring, and nothing outside the decoder layers
is looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import attrs
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionConfig, Site
from eulerforge.errors import ModelError
from eulerforge.lora.coverage import Place, layer_names, uncovered


@attrs.frozen(kw_only=True)
class Target:
    """One module to adapt: its full path, layer index, role, and the keyword that reached it.

    ``parameter`` is as in ``Site``: None for a linear module, else the bare parameter of ``module`` that is meant; two
    targets may then share one module.
    """

    path: str
    layer: int
    role: str
    keyword: str
    module: nn.Module
    parameter: str | None = None


@attrs.frozen(kw_only=True)
class Selection:
    """What the keywords reached; ``keywords``, ``unmatched`` and ``partial`` are as in ``InjectionReport``."""

    depth: int
    layers: tuple[int, ...]
    keywords: tuple[str, ...]
    targets: tuple[Target, ...]
    unmatched: dict[str, tuple[str, ...]]
    partial: dict[str, tuple[int, ...]]


def choose_layers(depth: int, config: InjectionConfig) -> tuple[int, ...]:
    """The layer indices that the preset asks for.

    Raises:
        ModelError: an index lies beyond the model's depth.
    """
    if config.layer_indices:
        chosen = tuple(sorted(config.layer_indices))
        key, end = "injection.layer_indices", chosen[-1] + 1
    else:
        end = config.start_layer + config.num_layers if config.num_layers else max(depth, config.start_layer + 1)
        key, chosen = "injection.start_layer", tuple(range(config.start_layer, end))
    if end > depth:
        raise ModelError(
            f"layers up to {end - 1} are asked for, but the model has {depth} layers (0 to {depth - 1})",
            key=key,
            hint=f"start_layer + num_layers may be {depth} at most; num_layers = 0 means all from start_layer on",
        )
    return chosen


def matches(site: Site, keyword: str, adapter: BackboneAdapter, match: str) -> bool:
    """Whether a keyword means this place: by its exact name or, with ``match = role``, by the adapter's translation."""
    return site.name == keyword or (match == "role" and site.role in adapter.roles_of(keyword))


def select_targets(
    model: nn.Module, adapter: BackboneAdapter, config: InjectionConfig, keywords: Sequence[str]
) -> Selection:
    """Resolve ``keywords`` in the chosen layers; a place that two keywords mean is taken once.

    Raises:
        ModelError: the chosen layers do not exist, or a layer that the adapter names is not in the model.
    """
    layers = list(adapter.find_transformer_layers(model))
    chosen = choose_layers(len(layers), config)
    prefixes = layer_names(model, adapter, layers)
    sites = {index: tuple(adapter.find_sites(layers[index])) for index in chosen}
    hit: set[str] = set()
    targets: dict[Place, Target] = {}
    for index, keyword, site in ((i, keyword, site) for i in chosen for site in sites[i] for keyword in keywords):
        if not matches(site, keyword, adapter, config.match):
            continue
        hit.add(keyword)
        targets.setdefault(
            Place(index, site.path, site.parameter),
            Target(
                path=f"{prefixes[index]}.{site.path}",
                layer=index,
                role=site.role,
                keyword=keyword,
                module=layers[index].get_submodule(site.path),
                parameter=site.parameter,
            ),
        )
    seen = sorted({site.name for found in sites.values() for site in found})
    gaps = uncovered(adapter, sites, [keyword for keyword in keywords if keyword in hit], targets)
    return Selection(
        depth=len(layers),
        layers=chosen,
        keywords=tuple(keywords),
        targets=tuple(targets.values()),
        unmatched={
            keyword: tuple(difflib.get_close_matches(keyword, seen, n=3, cutoff=0.5)) or tuple(seen)
            for keyword in keywords
            if keyword not in hit
        },
        partial={keyword: gap.layers for keyword, gap in gaps.items()},
    )
