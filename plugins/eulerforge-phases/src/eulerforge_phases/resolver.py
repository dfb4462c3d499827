"""The standard groups: what was injected comes from the report, what belongs to the base from the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from torch import nn

from eulerforge.api import BackboneAdapter, InjectionReport

FFN_ROLES = ("ffn.", "experts.", "shared_expert.")


class StandardGroups:
    """``lora``, ``attn_lora``: the injected parameters; ``router``, ``base_ffn``: base weights of the chosen layers."""

    def resolve(
        self, model: nn.Module, adapter: BackboneAdapter, report: InjectionReport
    ) -> Mapping[str, Sequence[str]]:
        injected = report.groups
        added = set(chain.from_iterable(injected.values()))
        names = {id(module): name for name, module in model.named_modules()}
        routers: list[str] = []
        ffn: list[str] = []
        layers = list(adapter.find_transformer_layers(model))
        for index in report.layers:
            layer, prefix = layers[index], names[id(layers[index])]
            routers += [f"{prefix}.{name}" for name in adapter.find_routers(layer)]
            for site in adapter.find_sites(layer):
                if site.role.startswith(FFN_ROLES):
                    module = layer.get_submodule(site.path)
                    # of a module with bare parameters only the one that the site means; wrapped, it is base_layer's
                    own = [
                        name
                        for name, _ in module.named_parameters()
                        if site.parameter is None or name.removeprefix("base_layer.") == site.parameter
                    ]
                    found = (f"{prefix}.{site.path}.{name}" for name in own)
                    ffn += [name for name in found if name not in added]
        return {
            "lora": injected.get("lora", ()),
            "attn_lora": injected.get("attn_lora", ()),
            "router": tuple(routers),
            "base_ffn": tuple(ffn),
        }
