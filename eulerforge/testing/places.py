"""What an adapter says of a plain model: layers, places, roles, keywords, routers. Nothing is injected here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from eulerforge.api import BackboneAdapter, BackboneSpec, Site
from eulerforge.errors import EulerForgeError
from eulerforge.testing.conventions import NAMES, hidden_width, role_by_name, wrong_shape
from eulerforge.testing.fault import Nonconforming, blamed, listed, nearest, require
from eulerforge.testing.installed import made, offer_of
from eulerforge.testing.probe import loud
from eulerforge.testing.tiny_models import tiny_model_of


class PlacesConformance:
    """The half of ``BackboneConformance`` that looks."""

    plugin = ""
    backbone = ""
    model_types: tuple[str, ...] = ()
    models: Mapping[str, Callable[[], Any]] = {}
    unconventional: Mapping[str, str] = {}
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

    def test_every_role_is_in_the_spec(self, model_type: str) -> None:
        """No site has a role that the spec does not list."""
        spec = self.spec()
        for sites in self.sites(self.make(model_type)).values():
            for site in sites:
                require(
                    site.role == "other" or site.role in spec.roles,
                    f"the site {site.path} has the role {site.role}, which the spec does not list"
                    f" ({nearest(site.role, spec.roles)})",
                    "correct the role in the adapter, or add it to roles of BackboneSpec",
                )

    def test_every_role_of_the_spec_has_a_place(self) -> None:
        """Every role that the spec lists has a place in at least one model."""
        found, paths, routers = self._everything()
        table = getattr(self.adapter(), "roles", {})
        for role in self.spec().roles:
            if role == "router":
                require(
                    bool(routers),
                    "the spec lists the role router, but find_routers names nothing in any model",
                    "name the layer's router parameters, such as mlp.gate.weight",
                )
                continue
            stray = [path for path, own in table.items() if own == role and path not in paths]
            detail = f", its path {stray[0]} is in no layer ({nearest(stray[0], paths)})" if stray else ""
            require(
                role in found,
                f"no layer has a place of the role {role} that the spec lists{detail}",
                "correct the site path in the adapter, or take the role out of BackboneSpec",
            )

    def test_roles_fit_names_and_shapes(self, model_type: str) -> None:
        """A role fits the module's name, and its weight reads or writes the layer's width."""
        model = self.make(model_type)
        width = hidden_width(model)
        for layer, sites in zip(self.layers(model), self.sites(model).values(), strict=True):
            for site in sites:
                if site.role == "other" or self.unconventional.get(site.path) == site.role:
                    continue
                usual = role_by_name(site)
                require(
                    not usual or site.role.rpartition(".")[2] in usual,
                    f"the site {site.path} has the role {site.role}, but its name says {' or '.join(usual)}",
                    f"correct the role, or write unconventional = {{{site.path!r}: {site.role!r}}} in the test class",
                )
                wrong = wrong_shape(layer, site, width)
                require(not wrong, f"the site {site.path} has the role {site.role}, but {wrong}", "correct the role")

    def test_keywords_reach_what_they_say(self) -> None:
        """Every keyword reaches a place, and means roles that exist and fit its name."""
        adapter, (found, _, _) = self.adapter(), self._everything()
        names = {site.name for sites in found.values() for site in sites}
        table = getattr(adapter, "keywords", {})
        defaults = tuple(adapter.default_keywords)
        require(bool(defaults), "default_keywords is empty", "name those that your family's users mean")
        spec_roles = self.spec().roles
        for keyword in dict.fromkeys([*defaults, *table]):
            roles = tuple(adapter.roles_of(keyword))
            reaches = keyword in names or any(role in found for role in roles)
            # a keyword of a shared table that means only roles which the spec does not promise is no promise either
            promised = keyword in defaults or not roles or any(role in spec_roles for role in roles)
            unknown = [role for role in roles if role not in found and not _known_elsewhere(role)]
            require(
                not unknown,
                f"the keyword {keyword} means the role {listed(unknown)}, which no place has"
                f" ({nearest(unknown[0], found.keys()) if unknown else ''})",
                "correct the role in the adapter's keywords",
            )
            usual = NAMES.get(keyword, ()) if self.unconventional.get(keyword) not in roles else ()
            strange = [role for role in roles if not any(word in role.rpartition(".")[2] for word in usual)]
            require(
                not usual or not strange,
                f"the keyword {keyword} means the role {listed(strange)}, but its name says {' or '.join(usual)}",
                "correct the keywords of the adapter, or write it into unconventional of the test class",
            )
            require(
                reaches or not promised,
                f"the keyword {keyword} reaches nothing in any model",
                "let roles_of give the roles of the places that it means, or take it out",
            )

    def test_default_keywords_reach_every_layer(self, model_type: str) -> None:
        """The default keywords leave no layer out."""
        from eulerforge.api import InjectionConfig
        from eulerforge.lora.targets import select_targets

        model, adapter = self.make(model_type), self.adapter()
        with blamed("selecting the default keywords", "the sites must be modules of the layers"):
            chosen = select_targets(model, adapter, InjectionConfig(), adapter.default_keywords)
        for keyword, near in chosen.unmatched.items():
            raise Nonconforming(
                f"the default keyword {keyword} reaches nothing in {model_type}: let roles_of translate it; "
                f"the places are called {listed(near)}"
            )
        for keyword, missed in chosen.partial.items():
            raise Nonconforming(
                f"the default keyword {keyword} does not reach layers {listed([str(index) for index in missed])} of "
                f"{model_type}: let roles_of give the roles that those layers have in its place"
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

    def _everything(self) -> tuple[dict[str, list[Site]], set[str], set[str]]:
        """Over all models: sites by role, every path of a module or parameter in a layer, and the routers."""
        found: dict[str, list[Site]] = {}
        paths: set[str] = set()
        routers: set[str] = set()
        adapter = self.adapter()
        for model_type in self.model_types or ("none",):
            model = self.make(model_type)
            for layer, sites in zip(self.layers(model), self.sites(model).values(), strict=True):
                paths |= {name for name, _ in layer.named_modules()} | {name for name, _ in layer.named_parameters()}
                for site in sites:
                    found.setdefault(site.role, []).append(site)
                try:
                    routers |= set(adapter.find_routers(layer))
                except EulerForgeError:
                    continue
        return found, paths, routers


def _known_elsewhere(role: str) -> bool:
    """A role of our vocabulary; a table that several families share may mean it in another one."""
    from eulerforge.models.layout import MIXTURE_ROLES

    return role in MIXTURE_ROLES.values() or role == "router"
