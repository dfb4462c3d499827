"""From a user's keywords to modules: which layers, which places, and what was not reached.

Every strategy that adapts linear modules shares this; nothing is matched by substring, and nothing outside the
decoder layers is looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import attrs
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionConfig, Site
from eulerforge.errors import ModelError


@attrs.frozen(kw_only=True)
class Target:
    """One module to adapt: its full path, layer index, role, and the keyword that reached it."""

    path: str
    layer: int
    role: str
    keyword: str
    module: nn.Module


@attrs.frozen(kw_only=True)
class Selection:
    """What the keywords reached; ``unmatched`` and ``partial`` are as in ``InjectionReport``."""

    depth: int
    layers: tuple[int, ...]
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
    names = {id(module): name for name, module in model.named_modules()}
    reached: dict[str, set[int]] = {keyword: set() for keyword in keywords}
    targets: dict[str, Target] = {}
    seen: set[str] = set()
    for index in chosen:
        layer = layers[index]
        if id(layer) not in names:
            raise ModelError(f"the backbone adapter {type(adapter).__name__} gives a layer that is not in the model")
        for site in adapter.find_sites(layer):
            seen.add(site.name)
            for keyword in keywords:
                if matches(site, keyword, adapter, config.match):
                    reached[keyword].add(index)
                    path = f"{names[id(layer)]}.{site.path}"
                    targets.setdefault(
                        path,
                        Target(
                            path=path,
                            layer=index,
                            role=site.role,
                            keyword=keyword,
                            module=layer.get_submodule(site.path),
                        ),
                    )
    return Selection(
        depth=len(layers),
        layers=chosen,
        targets=tuple(targets.values()),
        unmatched={
            keyword: tuple(difflib.get_close_matches(keyword, sorted(seen), n=3, cutoff=0.5)) or tuple(sorted(seen))
            for keyword in keywords
            if not reached[keyword]
        },
        partial={
            keyword: tuple(index for index in chosen if index not in hit)
            for keyword, hit in reached.items()
            if hit and len(hit) < len(chosen)
        },
    )
