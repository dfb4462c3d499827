"""A backbone adapter written straight to the protocol: four methods and one attribute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from eulerforge.api import Site

ROLES = {"mlp.down_proj": "ffn.down", "self_attn.o_proj": "attn.o"}


class DemoLlama:
    """Knows the two projections that write into the residual stream; the others are sites without a role."""

    default_keywords = ("down_proj",)

    def find_transformer_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.get_decoder().layers)

    def find_sites(self, layer: nn.Module) -> Sequence[Site]:
        # asked again after the injection: an adapted module counts once, as its wrapper
        return [
            Site(path, ROLES.get(path, "other"))
            for path, module in layer.named_modules()
            if isinstance(getattr(module, "base_layer", module), nn.Linear) and not path.endswith(".base_layer")
        ]

    def find_routers(self, layer: nn.Module) -> Sequence[str]:
        return ()

    def roles_of(self, keyword: str) -> Sequence[str]:
        return tuple(role for path, role in ROLES.items() if path.endswith(f".{keyword}"))
