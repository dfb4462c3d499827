"""What an adapter calls the places of a plain model: roles, and the keywords that mean them."""

from __future__ import annotations

from collections.abc import Mapping

from eulerforge.api import Site
from eulerforge.errors import EulerForgeError
from eulerforge.testing.conventions import NAMES, hidden_width, role_by_name, wrong_shape
from eulerforge.testing.fault import Nonconforming, blamed, listed, nearest, require
from eulerforge.testing.places import PlacesConformance


class RolesConformance(PlacesConformance):
    """The part of ``BackboneConformance`` that holds roles and keywords against names, shapes and the spec."""

    unconventional: Mapping[str, str] = {}

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
