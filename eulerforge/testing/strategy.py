"""Whether an injection strategy trains, merges, reloads and reports truly, and whether its keys are strict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from eulerforge.api import BackboneAdapter, InjectionConfig, InjectionContext, InjectionReport, StrategySpec
from eulerforge.config import load_run_config
from eulerforge.config.structure import leaf_keys
from eulerforge.errors import ConfigError
from eulerforge.lora.state import adapter_state
from eulerforge.models.layout import DenseAdapter
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.testing import behaviour
from eulerforge.testing.fault import Nonconforming, blamed, listed, require
from eulerforge.testing.installed import made, offer_of, registry
from eulerforge.testing.probe import logits_of, loud
from eulerforge.testing.tiny_models import tiny_model_of


class StrategyConformance:
    """Inherit it in a class whose name starts with ``Test``.

    ``plugin`` is the entry module, ``strategy`` the name in the spec.
    ``settings`` are keys of ``injection`` as a preset has them; the defaults must be valid without any.
    ``starts_as_identity`` is False for a strategy that changes the output before it is trained.
    ``model_type`` is the family that it is tried on; ``backbone`` gives the places there.
    """

    plugin = ""
    strategy = ""
    settings: Mapping[str, Any] = {}
    starts_as_identity = True
    model_type = "llama"

    def backbone(self) -> BackboneAdapter:
        """The adapter of ``model_type``; the default knows Llama's layout."""
        return DenseAdapter()

    def make(self) -> Any:
        """A small model with large random numbers, the same each time."""
        return loud(tiny_model_of(self.model_type))

    def spec(self) -> StrategySpec:
        spec = offer_of(self.plugin, "strategy", self.strategy).spec
        assert isinstance(spec, StrategySpec)  # noqa: S101 - for the type checker; offer_of looked for the kind
        return spec

    def config(self, **changes: Any) -> InjectionConfig:
        """The strategy's config as the core reads it from a preset with ``settings`` and ``changes``.

        Raises:
            ConfigError: it is refused.
        """
        offer_of(self.plugin, "strategy", self.strategy)
        keys = {"strategy": self.strategy, **self.settings, **changes}
        words = ["model_name=tiny", *(f"injection.{key}={json.dumps(value)}" for key, value in keys.items())]
        return load_run_config(None, words, strategy_configs=registry().strategy_config).run.injection

    def _valid(self, **changes: Any) -> InjectionConfig:
        with blamed(f"the preset of {self.strategy}", "the defaults and `settings` of the test class must be valid"):
            return self.config(**changes)

    def _inject(self, model: Any, *, seed: int = 0, **changes: Any) -> InjectionReport:
        strategy = made(offer_of(self.plugin, "strategy", self.strategy))
        context = InjectionContext(seed=seed, linear_ops=linear_ops_from(registry()))
        report = strategy.inject(model, self.backbone(), self._valid(**changes), context)
        require(
            isinstance(report, InjectionReport),
            f"inject of {self.strategy} gives a {type(report).__name__}",
            "return an InjectionReport",
        )
        return report

    def _hold(self, check: Any, *arguments: Any) -> None:
        __tracebackhide__ = True
        check(f"the strategy {self.strategy}", self.make, self._inject, *arguments)

    def test_the_settings_are_valid(self) -> None:
        """The defaults and `settings` make a valid config."""
        config = self._valid()
        require(
            isinstance(config, InjectionConfig),
            f"the config of {self.strategy} is a {type(config).__name__}",
            "extend InjectionConfig",
        )

    def test_unknown_keys_are_refused(self) -> None:
        """A key that is not declared is an error that names it."""
        try:
            self.config(no_such_key=1)
        except ConfigError as error:
            text = str(error)
            require("no_such_key" in text, f"an unknown key of {self.strategy} is refused as {text}", "name the key")
            return
        raise Nonconforming(f"{self.strategy} takes the unknown key no_such_key: declare every key with setting()")

    def test_a_value_of_another_type_is_refused(self) -> None:
        """No key takes a value of any type."""
        for key in leaf_keys(type(self._valid())):
            taken = [value for value in ({"a": "table"}, 0.5) if self._takes(key, value)]
            require(
                len(taken) < 2,
                f"injection.{key} of {self.strategy} takes a table and a number alike",
                "annotate the field with the type that it wants",
            )

    def test_every_key_is_a_setting_with_help(self) -> None:
        """Every key has a help text."""
        from eulerforge.plugins.describe import describe_keys

        silent = [key.name for key in describe_keys(type(self._valid())) if not key.help.strip()]
        require(
            not silent, f"{listed(silent)} of {self.strategy} has no help", "declare it with setting(..., help=...)"
        )

    def test_the_report_is_of_the_strategy_and_the_model(self) -> None:
        """The report has the spec's name, the model's depth, and declared groups only."""
        model, report = behaviour.injected(f"the strategy {self.strategy}", self.make, self._inject)
        require(
            report.strategy == self.strategy,
            f"the report names the strategy {report.strategy!r}, not {self.strategy!r}",
            "the name is that of the spec, because a checkpoint is opened by it",
        )
        depth = len(list(self.backbone().find_transformer_layers(model)))
        require(report.depth == depth, f"the report's depth is {report.depth} of {depth}", "it counts all layers")
        known = self.spec().groups
        strange = sorted({site.group for site in report.sites} - set(known))
        require(
            not strange,
            f"the report puts parameters into the group {listed(strange)}, which the spec does not declare",
            "add it to groups of StrategySpec, or no phase can name it",
        )

    def test_the_report_names_what_was_added(self) -> None:
        """The report names every added parameter, by its real name, with the right count, in fp32."""
        self._hold(behaviour.hold_report)

    def test_a_keyword_that_matches_nothing_is_reported(self) -> None:
        """A keyword that reaches nothing is in `unmatched`."""
        config = self._valid()
        keywords = [*config.target_keywords, "no_such_projection"]
        report = self._inject(self.make(), target_keywords=keywords)
        require(
            "no_such_projection" in report.unmatched,
            f"{self.strategy} says nothing of a keyword that matches nothing",
            "hand on unmatched and partial of select_targets",
        )

    def test_the_window_of_layers(self) -> None:
        """start_layer and num_layers are kept."""
        model = self.make()
        report = self._inject(model, start_layer=1, num_layers=1)
        reached = sorted({site.layer for site in report.sites})
        require(
            reached == [1] and tuple(report.layers) == (1,),
            f"start_layer = 1, num_layers = 1 adapts layers {reached} and reports {list(report.layers)}",
            "let select_targets choose the layers",
        )

    def test_the_output_before_training(self) -> None:
        """It starts as the identity, or says that it does not."""
        if self.starts_as_identity:
            self._hold(behaviour.hold_identity)
            return
        model, _ = behaviour.injected(f"the strategy {self.strategy}", self.make, self._inject)
        require(
            not torch.equal(logits_of(model), logits_of(self.make())),
            f"{self.strategy} starts as the identity, though the test class says starts_as_identity = False",
            "take that line out",
        )

    def test_the_base_is_frozen(self) -> None:
        """A training step changes what was injected and nothing else."""
        self._hold(behaviour.hold_frozen_base)

    def test_a_gradient_reaches_every_parameter(self) -> None:
        """Every parameter that it adds gets a gradient that is not zero."""
        self._hold(behaviour.hold_gradients)

    def test_the_merged_model_equals_the_live_one(self) -> None:
        """Merged and live logits are equal up to rounding, and no wrapper is left."""
        self._hold(behaviour.hold_merge)

    def test_unwrapping_restores_the_model(self) -> None:
        """Without its adapters the model is the same to the bit."""
        self._hold(behaviour.hold_unwrap)

    def test_a_checkpoint_is_saved_and_reloaded(self, tmp_path: Path) -> None:
        """A checkpoint gives the same logits, to the bit, in a model injected anew."""
        self._hold(behaviour.hold_reload, tmp_path)

    def test_a_second_injection_is_refused(self) -> None:
        """Injecting twice is an error."""
        self._hold(behaviour.hold_one_injection)

    def test_initial_values_come_from_the_seed_alone(self) -> None:
        """Equal seeds give equal values, whatever torch's global random state is."""
        first = self._values(seed=5)
        torch.manual_seed(99)
        again = self._values(seed=5)
        other = [name for name, tensor in first.items() if not torch.equal(tensor, again[name])]
        require(
            not other,
            f"{listed(other)} of {self.strategy} has other values in a second run of the same seed",
            "draw from torch.Generator().manual_seed(...) made from context.seed, not from torch's global state",
        )
        model = self.make()
        state = torch.random.get_rng_state()
        self._inject(model, seed=5)
        moved = not torch.equal(state, torch.random.get_rng_state())
        require(not moved, f"{self.strategy} draws from torch's global random state", "make a generator of your own")

    def test_a_base_in_bf16(self) -> None:
        """With a bf16 base its parameters are fp32 and the output is finite."""
        model = self.make().bfloat16()
        model.requires_grad_(False)
        report = self._inject(model)
        parameters = dict(model.named_parameters())
        named = {name for site in report.sites for name in site.parameters} & parameters.keys()
        narrow = sorted(name for name in named if parameters[name].dtype != torch.float32)
        require(not narrow, f"{listed(narrow)} of {self.strategy} takes the base's bf16", "adapters are fp32")
        with blamed(f"a bf16 forward pass with {self.strategy}", "cast the adapter to the input's dtype in forward"):
            logits = logits_of(model)
        require(bool(logits.isfinite().all()), f"bf16 logits with {self.strategy} are not finite", "check the dtypes")

    def test_weights_that_are_stored_in_bf16(self) -> None:
        """If it says `stored_weights`, it does beside such weights what it does beside fp32 ones."""
        if self.spec().stored_weights:
            self._hold(behaviour.hold_stored)

    def test_it_can_be_rehearsed_without_weights(self) -> None:
        """On the meta device it gives the same report."""
        model, shapes = self.make(), self.make().to("meta")
        real = self._inject(model)
        try:
            rehearsed = self._inject(shapes)
        except Exception as error:
            if "meta tensor" in str(error):
                return  # it looks at values; the core then checks the coverage after loading
            raise Nonconforming(
                f"injecting {self.strategy} on the meta device raises {type(error).__name__}, {error}: make parameters "
                "on the device of the base's weight"
            ) from error
        require(
            attrs.asdict(rehearsed) == attrs.asdict(real),
            f"the report of {self.strategy} on the meta device is another one than on the CPU",
            "it may depend on shapes alone",
        )
        stray = [name for name, tensor in shapes.named_parameters() if tensor.device.type != "meta"]
        require(not stray, f"{listed(stray)} of {self.strategy} is not on the base's device", "use weight.device")

    def _takes(self, key: str, value: Any) -> bool:
        try:
            self.config(**{key: value})
        except ConfigError:
            return False
        return True

    def _values(self, seed: int) -> dict[str, torch.Tensor]:
        model = self.make()
        with blamed(f"injecting with {self.strategy}", "inject changes the model in place"):
            self._inject(model, seed=seed)
        return {name: tensor.clone() for name, tensor in adapter_state(model).items()}
