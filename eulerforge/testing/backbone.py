"""Whether a backbone adapter finds the right places, and whether what is injected there trains, merges and reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eulerforge.api import InjectionConfig, InjectionReport
from eulerforge.testing import behaviour
from eulerforge.testing.fault import Nonconforming, blamed, listed, require
from eulerforge.testing.probe import inject, keywords_of
from eulerforge.testing.roles import RolesConformance
from eulerforge.training.headcheck import check_head
from eulerforge.training.isolation import isolate, prove


class BackboneConformance(RolesConformance):
    """Inherit it in a class whose name starts with ``Test``.

    ``plugin`` is the entry module, ``backbone`` the name in the spec, ``model_types`` what the adapter must cover.
    ``models`` maps a model_type to a function that makes a small model, where transformers alone cannot.
    ``unconventional`` maps a site's path to its role where name and role differ on purpose.
    ``left_out`` are linear modules of a layer that no keyword shall reach.
    """

    def _inject(self, model: Any) -> InjectionReport:
        return inject(model, self.adapter())

    def _hold(self, check: Any, model_type: str, *arguments: Any) -> None:
        __tracebackhide__ = True
        check(f"the adapter of {self.backbone}", lambda: self.make(model_type), self._inject, *arguments)

    def test_the_window_of_layers(self, model_type: str) -> None:
        """start_layer and num_layers reach exactly the layers that they count."""
        plain = self.make(model_type)
        depth = int(plain.config.get_text_config().num_hidden_layers)
        names = {id(module): name for name, module in plain.named_modules()}
        # the model's own word, where it has one: the adapter's may be what is wrong
        layers = getattr(plain.get_decoder(), "layers", None) or self.layers(plain)
        paths = [names[id(layer)] for layer in layers]
        for start, count in ((1, 1), (depth - 1, 0), (0, depth - 1)):
            model = self.make(model_type)
            config = InjectionConfig(start_layer=start, num_layers=count)
            with blamed(f"injecting with start_layer {start}", "find_transformer_layers gives all layers in order"):
                report = inject(model, self.adapter(), config)
            wanted = set(range(start, start + count if count else depth))
            reached = {index for site in report.sites for index, path in enumerate(paths) if _below(site.path, path)}
            window = f"start_layer = {start}, num_layers = {count}"
            require(
                reached == wanted,
                f"{window} reaches layers {sorted(reached)} instead of {sorted(wanted)}",
                "find_transformer_layers gives every layer once, in order, and each layer has a place with a role",
            )

    def test_a_wrapped_place_stays_one_place(self, model_type: str) -> None:
        """find_sites gives the same places before and after an injection."""
        model = self.make(model_type)
        before = self.sites(model)
        adapted, _ = behaviour.injected(f"the adapter of {self.backbone}", lambda: self.make(model_type), self._inject)
        after = self.sites(adapted)
        for index, sites in before.items():
            lost = [site.path for site in sites if site not in after[index]]
            extra = [site.path for site in after[index] if site not in sites]
            require(
                not lost and not extra,
                f"find_sites of a layer with adapters loses {listed(lost) or 'nothing'} and finds "
                f"{listed(extra) or 'nothing'} besides",
                "look through a wrapper (its base_layer) and count it once, as TableAdapter does, because phase groups "
                "and a second injection ask again",
            )

    def test_the_output_is_the_same_before_training(self, model_type: str) -> None:
        """Fresh LoRA in every place changes no logit."""
        self._hold(behaviour.hold_identity, model_type)

    def test_the_base_is_frozen(self, model_type: str) -> None:
        """A training step changes what was injected and nothing else."""
        self._hold(behaviour.hold_frozen_base, model_type)

    def test_a_gradient_reaches_every_adapter(self, model_type: str) -> None:
        """Every injected tensor gets a gradient that is not zero."""
        self._hold(behaviour.hold_gradients, model_type)

    def test_the_merged_model_equals_the_live_one(self, model_type: str) -> None:
        """Merged and live logits are equal up to rounding, and no wrapper is left."""
        self._hold(behaviour.hold_merge, model_type)

    def test_unwrapping_restores_the_model(self, model_type: str) -> None:
        """Without its adapters the model is the same to the bit."""
        self._hold(behaviour.hold_unwrap, model_type)

    def test_a_checkpoint_is_saved_and_reloaded(self, model_type: str, tmp_path: Path) -> None:
        """A checkpoint gives the same logits, to the bit, in a model injected anew."""
        self._hold(behaviour.hold_reload, model_type, tmp_path)

    def test_a_second_injection_is_refused(self, model_type: str) -> None:
        """Injecting twice is an error."""
        self._hold(behaviour.hold_one_injection, model_type)

    def test_packed_documents_are_kept_apart(self, model_type: str) -> None:
        """No document of a packed row sees another, when the spec says how they are kept apart."""
        spec, model = self.spec(), self.make(model_type)
        if spec.isolation == "none":
            return
        with blamed(f"isolation = {spec.isolation!r} of the spec", "say isolation = 'none' when documents cannot be"):
            installed = isolate(model, spec, self.adapter())
            require(installed.possible, f"the spec says {spec.isolation!r}, but {installed.reason}", "say 'none'")
            prove(model)
        if spec.isolation == "gather" and not installed.mixers:
            raise Nonconforming(
                "the spec says isolation = 'gather', but find_sequence_mixers names no module: say 'attention'"
            )

    def test_the_logits_are_the_head_s(self, model_type: str) -> None:
        """The loss takes the head's product with the last states for the logits."""
        with blamed("the model's forward pass", "a model that scales its logits cannot be trained"):
            require(check_head(self.make(model_type)) is None, "its logits cannot be computed", "see its forward pass")

    def test_every_place_with_a_role_is_adapted(self, model_type: str) -> None:
        """Every place that has a role can be reached by a keyword."""
        model = self.make(model_type)
        keywords = keywords_of(model, self.adapter())
        require(bool(keywords), f"no place of {model_type} has a role", "give find_sites roles")
        places = {
            (index, site.path, site.parameter)
            for index, sites in self.sites(model).items()
            for site in sites
            if site.role != "other"
        }
        names = {id(module): name for name, module in model.named_modules()}
        prefixes = [names.get(id(layer), "?") for layer in self.layers(model)]
        with blamed(f"injecting with the adapter of {self.backbone}", "every site must be a module of its layer"):
            report = self._inject(model)
        done = {
            (site.layer, site.path.removeprefix(f"{prefixes[site.layer]}."), site.base_parameter)
            for site in report.sites
        }
        missed = sorted(f"{path} of layer {index}" for index, path, _ in places - done)
        require(not missed, f"{listed(missed)} has a role, but no adapter", "a role must lead back to its place")


def _below(path: str, prefix: str) -> bool:
    return path.startswith(f"{prefix}.")
