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

    A linear module that ``roles`` does not list is still a site, with the role ``other``: an exact keyword reaches it.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    keywords: ClassVar[Mapping[str, Sequence[str]]] = {}
    routers: ClassVar[Sequence[str]] = ()
    default_keywords: Sequence[str] = ("gate_proj", "up_proj", "down_proj")

    def find_transformer_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder's layers, wherever the family keeps them.

        Raises:
            ModelError: the model has no decoder with layers.
        """
        get_decoder = getattr(model, "get_decoder", None)
        layers = getattr(get_decoder(), "layers", None) if callable(get_decoder) else None
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ModelError(f"{type(model).__name__} has no decoder layers that {type(self).__name__} knows")
        return list(layers)

    def find_sites(self, layer: nn.Module) -> Sequence[Site]:
        """Every linear module of the layer, in the layer's order; a wrapped one counts once, as the wrapper."""
        sites, inside = [], ""
        for path, module in layer.named_modules():
            if inside and path.startswith(inside):
                continue
            base = getattr(module, "base_layer", None)
            if isinstance(module, nn.Linear) or isinstance(base, nn.Linear):
                sites.append(Site(path, self.roles.get(path, "other")))
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
