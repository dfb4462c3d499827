"""Which layers a keyword reaches, and what it means there that nothing adapted.

A keyword covers a layer when every place that it means there is adapted, by whichever keyword.
Where it means none, as ``in_proj_qkv`` in a layer of full attention, another adapted place of the same part of the
layer (attention or feed-forward) covers the layer too: then both keywords together leave no layer out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import attrs
from torch import nn

from eulerforge.api import BackboneAdapter, Site
from eulerforge.errors import ModelError

PARTS = {
    "attn": "attention",
    "linear_attn": "attention",
    "ffn": "feed-forward",
    "experts": "feed-forward",
    "shared_expert": "feed-forward",
}
"""The part of a layer that a role belongs to, by the role's first word; a word that is not listed is its own part."""


class Place(NamedTuple):
    """A site of one layer: the layer's index, the site's path in the layer, and its bare parameter or None."""

    layer: int
    path: str
    parameter: str | None


@attrs.frozen
class Gap:
    """The layers that a keyword does not cover.

    ``untouched`` are those in which nothing that it means is adapted; ``left_out`` maps a role that it means to the
    layers in which a place of this role is not adapted.
    """

    layers: tuple[int, ...]
    untouched: tuple[int, ...]
    left_out: Mapping[str, tuple[int, ...]]


def layer_names(model: nn.Module, adapter: BackboneAdapter, layers: Sequence[nn.Module]) -> tuple[str, ...]:
    """The full name of each layer in the model.

    Raises:
        ModelError: the adapter gives a layer that is not in the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if any(id(layer) not in names for layer in layers):
        raise ModelError(
            f"the backbone adapter {type(adapter).__name__} gives a layer that is not in the model",
            hint="its find_transformer_layers must give modules of the model itself; tell the plugin's author",
        )
    return tuple(names[id(layer)] for layer in layers)


def uncovered(
    adapter: BackboneAdapter,
    sites: Mapping[int, Sequence[Site]],
    keywords: Sequence[str],
    adapted: Collection[Place],
) -> dict[str, Gap]:
    """The gap of every keyword that leaves one.

    Args:
        sites: all sites of each chosen layer, by the layer's index.
        adapted: the places that were adapted.
    """
    parts = {
        index: {_part(site) for site in found if Place(index, site.path, site.parameter) in adapted}
        for index, found in sites.items()
    }
    gaps = {}
    for keyword in keywords:
        roles = set(adapter.roles_of(keyword))
        meant = {
            index: [site for site in found if site.name == keyword or site.role in roles]
            for index, found in sites.items()
        }
        own_parts = {_part(site) for found in meant.values() for site in found}
        missed, untouched = [], []
        left_out: dict[str, list[int]] = {}
        for index, found in meant.items():
            without = [site for site in found if Place(index, site.path, site.parameter) not in adapted]
            for site in without:
                layers = left_out.setdefault(site.role, [])
                layers += [index] if index not in layers else []
            if without or (not found and not own_parts & parts[index]):
                missed.append(index)
                untouched += [index] if len(without) == len(found) else []
        if missed:
            gaps[keyword] = Gap(
                tuple(missed), tuple(untouched), {role: tuple(layers) for role, layers in left_out.items()}
            )
    return gaps


def _part(site: Site) -> str:
    head = site.role.partition(".")[0]
    return site.name if head == "other" else PARTS.get(head, head)
