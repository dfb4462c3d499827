"""A backbone adapter from two tables: the shape that most families need.

A plugin author may use it or write the four methods of ``BackboneAdapter`` by hand; the core cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from eulerforge.api import Site
from eulerforge.errors import ModelError


class TableAdapter:
    """``roles`` maps a module's path in a layer to its role, ``keywords`` a user's keyword to the roles it means.

    A path of ``roles`` may end in the name of a bare parameter (``mlp.experts.down_proj``): the site then names it.
    A linear module that ``roles`` does not list is still a site, with the role ``other``: an exact keyword reaches it.
    One in ``skipped`` is none: no keyword reaches it.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    keywords: ClassVar[Mapping[str, Sequence[str]]] = {}
    routers: ClassVar[Sequence[str]] = ()
    skipped: ClassVar[Sequence[str]] = ()
    default_keywords: Sequence[str] = ("gate_proj", "up_proj", "down_proj")

    def find_transformer_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder's layers, wherever the family keeps them.

        Raises:
            ModelError: the model has no decoder with layers.
        """
        get_decoder = getattr(model, "get_decoder", None)
        layers = getattr(get_decoder(), "layers", None) if callable(get_decoder) else None
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ModelError(
                f"{type(model).__name__} has no decoder layers that {type(self).__name__} knows",
                hint="name another backbone; eulerforge plugins list shows them",
                key="backbone",
            )
        return list(layers)

    def find_sites(self, layer: nn.Module) -> Sequence[Site]:
        """Every linear module and listed parameter, in the layer's order; a wrapped one counts once, as the wrapper."""
        sites: list[Site] = []
        inside = ""
        for path, module in layer.named_modules():
            if (inside and path.startswith(inside)) or path in self.skipped:
                continue
            base = getattr(module, "base_layer", module)
            if isinstance(base, nn.Linear):
                found = [Site(path, self.roles.get(path, "other"))]
            else:
                bare = [name for name, _ in base.named_parameters(recurse=False) if f"{path}.{name}" in self.roles]
                found = [Site(path, self.roles[f"{path}.{name}"], name) for name in bare]
            if found:
                sites += found
                inside = path + "."
        return sites

    def find_routers(self, layer: nn.Module) -> Sequence[str]:
        names = {name for name, _ in layer.named_parameters()}
        return tuple(path for path in self.routers if path in names)

    def roles_of(self, keyword: str) -> Sequence[str]:
        return self.keywords.get(keyword, ())


DENSE_ROLES: Mapping[str, str] = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
"""The layout that Llama introduced and most dense families share."""

DENSE_KEYWORDS: Mapping[str, tuple[str, ...]] = {path.rpartition(".")[2]: (role,) for path, role in DENSE_ROLES.items()}


class DenseAdapter(TableAdapter):
    """The adapter of a family with Llama's layout."""

    roles = DENSE_ROLES
    keywords = DENSE_KEYWORDS


MIXTURE_ROLES: Mapping[str, str] = {
    **DENSE_ROLES,
    "mlp.experts.gate_up_proj": "experts.gate_up",
    "mlp.experts.down_proj": "experts.down",
    "mlp.shared_expert.gate_proj": "shared_expert.gate",
    "mlp.shared_expert.up_proj": "shared_expert.up",
    "mlp.shared_expert.down_proj": "shared_expert.down",
}
"""The layout of transformers' mixtures: routed experts fused into two parameters, some with a shared expert beside."""

MIXTURE_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    **DENSE_KEYWORDS,
    "gate_proj": ("ffn.gate", "experts.gate_up", "shared_expert.gate"),
    "up_proj": ("ffn.up", "experts.gate_up", "shared_expert.up"),
    "down_proj": ("ffn.down", "experts.down", "shared_expert.down"),
    "gate_up_proj": ("experts.gate_up",),
}


class MixtureAdapter(TableAdapter):
    """The adapter of a family whose layers may be mixtures: a feed-forward keyword reaches every expert.

    Gate and up projection of the routed experts are one parameter, so either keyword reaches both.
    The shared expert's gate, a single output, is a router and not a site.
    """

    roles = MIXTURE_ROLES
    keywords = MIXTURE_KEYWORDS
    routers = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")
    skipped = ("mlp.shared_expert_gate",)
