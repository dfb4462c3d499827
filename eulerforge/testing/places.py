"""Where an adapter finds the places of a plain model: layers, sites, routers. Nothing is injected here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from eulerforge.api import BackboneAdapter, BackboneSpec, Site
from eulerforge.testing.fault import blamed, listed, nearest, require
from eulerforge.testing.installed import made, offer_of
from eulerforge.testing.probe import loud
from eulerforge.testing.tiny_models import tiny_model_of


class PlacesConformance:
    """The part of ``BackboneConformance`` that looks at places; ``roles`` asks what the adapter calls them."""

    plugin = ""
    backbone = ""
    model_types: tuple[str, ...] = ()
    models: Mapping[str, Callable[[], Any]] = {}
    left_out: Collection[str] = ()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """A test that takes ``model_type`` runs for each of the class."""
        if "model_type" in metafunc.fixturenames:
            metafunc.parametrize("model_type", self.model_types or ("none",))

    def spec(self) -> BackboneSpec:
        spec = offer_of(self.plugin, "backbone", self.backbone).spec
        assert isinstance(spec, BackboneSpec)  # noqa: S101 - for the type checker; offer_of looked for the kind
        return spec

    def adapter(self) -> BackboneAdapter:
        adapter: BackboneAdapter = made(offer_of(self.plugin, "backbone", self.backbone))
        return adapter

    def make(self, model_type: str) -> Any:
        """A small model with large random numbers, the same each time."""
        require(bool(self.model_types), "the test class names no model_types", "list those of the spec")
        with blamed(f"making a tiny model of model_type {model_type!r}", "give a function for it in `models`"):
            return loud(self.models[model_type]() if model_type in self.models else tiny_model_of(model_type))

    def layers(self, model: Any) -> list[nn.Module]:
        with blamed("find_transformer_layers", "it gives the decoder's layers, such as model.get_decoder().layers"):
            return list(self.adapter().find_transformer_layers(model))

    def sites(self, model: Any) -> dict[int, tuple[Site, ...]]:
        adapter = self.adapter()
        with blamed("find_sites", "it takes one layer and gives its places"):
            return {index: tuple(adapter.find_sites(layer)) for index, layer in enumerate(self.layers(model))}

    def test_every_model_type_is_declared_and_tested(self) -> None:
        """The spec's model_types are those of the test class."""
        spec = self.spec()
        missing = [name for name in self.model_types if name not in spec.model_types]
        require(
            not missing,
            f"model_types of the spec lacks {listed(missing)}, so backbone = auto does not find {self.backbone}",
            "add it to model_types of BackboneSpec",
        )
        untested = [name for name in spec.model_types if name not in self.model_types]
        require(
            not untested,
            f"model_types of the spec has {listed(untested)}, which no test covers",
            "add it to model_types of the test class, or take it out of BackboneSpec",
        )

    def test_the_layers_are_the_decoders(self, model_type: str) -> None:
        """Every decoder layer, once, in order, and none of another tower."""
        model = self.make(model_type)
        layers = self.layers(model)
        depth = int(model.config.get_text_config().num_hidden_layers)
        gives = f"the adapter's find_transformer_layers gives {len(layers)} of {depth} layers"
        require(len(layers) == depth, gives, "give every decoder layer, in order, or training skips some silently")
        names = {id(module): name for name, module in model.named_modules()}
        paths = [names.get(id(layer), "") for layer in layers]
        require(all(paths), "find_transformer_layers gives a layer that is not in the model", "give the modules as is")
        order = [name for name, _ in model.named_modules() if name in paths]
        require(
            paths == order,
            f"find_transformer_layers gives the layers in the order {listed(paths)}",
            "give each once, from the first to the last, because start_layer counts them",
        )
        stack = {id(module) for module in model.get_decoder().modules()}
        outside = [path for path, layer in zip(paths, layers, strict=True) if id(layer) not in stack]
        require(not outside, f"{listed(outside)} lies outside the language stack", "leave vision and audio towers out")

    def test_the_sites_are_places_in_the_layer(self, model_type: str) -> None:
        """Every site is a linear module or a bare parameter of its layer, and there once."""
        model = self.make(model_type)
        layers = self.layers(model)
        for index, sites in self.sites(model).items():
            modules = dict(layers[index].named_modules())
            seen: set[tuple[str, str | None]] = set()
            for site in sites:
                key = (site.path, site.parameter)
                require(key not in seen, f"layer {index} has the site {site.path} twice", "a place is one site")
                seen.add(key)
                require(
                    site.path in modules,
                    f"the site path {site.path} is no module of layer {index} ({nearest(site.path, modules.keys())})",
                    "paths are relative to the layer, as layer.named_modules() spells them",
                )
                own = dict(modules[site.path].named_parameters(recurse=False))
                if site.parameter is None:
                    fits, what = isinstance(modules[site.path], nn.Linear), "no linear module"
                else:
                    fits, what = site.parameter in own, f"without a parameter {site.parameter}"
                require(
                    fits,
                    f"the site {site.path} of layer {index} is a {type(modules[site.path]).__name__}, {what}",
                    "a site is a linear module, or names a bare parameter of its module",
                )

    def test_routers_are_parameters(self, model_type: str) -> None:
        """find_routers names parameters of the layer, and a mixture has some."""
        model, adapter = self.make(model_type), self.adapter()
        text = model.config.get_text_config()
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
        some = False
        for index, layer in enumerate(self.layers(model)):
            own = {name for name, _ in layer.named_parameters()}
            with blamed("find_routers", "it gives names of the layer's parameters, and none for a dense layer"):
                routers = tuple(adapter.find_routers(layer))
            some = some or bool(routers)
            unreal = [name for name in routers if name not in own]
            require(
                not unreal,
                f"find_routers names {listed(unreal)}, no parameter of layer {index}"
                f" ({nearest(unreal[0], own) if unreal else ''})",
                "name parameters as layer.named_parameters() does, and none for a dense layer",
            )
        require(
            some or not experts,
            f"{model_type} has {experts} experts in a layer, but find_routers names no router",
            "name the parameter that chooses the experts, such as mlp.gate.weight",
        )

    def test_groups_are_disjoint_and_cover_the_layer(self, model_type: str) -> None:
        """No weight is router and site, and every linear module is a site."""
        model, adapter = self.make(model_type), self.adapter()
        left_out = {*self.left_out, *getattr(adapter, "skipped", ())}
        for index, (layer, sites) in enumerate(zip(self.layers(model), self.sites(model).values(), strict=True)):
            places = {site.path for site in sites}
            weights = {f"{site.path}.{site.parameter or 'weight'}" for site in sites}
            routers = set(adapter.find_routers(layer))
            both = sorted(weights & routers)
            require(
                not both,
                f"{listed(both)} of layer {index} is a router and a site, so two phase groups would train it",
                "leave routers out of find_sites (TableAdapter: put the module into skipped)",
            )
            bare = [
                path
                for path, module in layer.named_modules()
                if isinstance(module, nn.Linear)
                and path not in places | left_out
                and f"{path}.weight" not in routers
                and not path.startswith(tuple(f"{place}." for place in places))
            ]
            require(
                not bare,
                f"the linear modules {listed(bare)} of layer {index} are no site, so no keyword can reach them",
                "give them as sites with the role other, or write left_out in the test class",
            )

    def test_two_answers_are_equal(self, model_type: str) -> None:
        """The adapter keeps no state and changes nothing."""
        model = self.make(model_type)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        first, second = self.sites(model), self.sites(model)
        require(first == second, "find_sites gives two answers for one layer", "an adapter keeps no state")
        same = all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        require(same, "asking the adapter changes the model", "an adapter only looks")
