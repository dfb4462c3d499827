"""What holds of every injected model: base frozen, gradients everywhere, merge, save, one injection only.

``inject`` is a function that injects into a model in place and gives back the report; ``make`` makes the same plain
model each time. ``who`` is whom a message blames.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from eulerforge.api import InjectionReport
from eulerforge.errors import EulerForgeError
from eulerforge.lora.merge import merge_in_place
from eulerforge.lora.state import adapter_state
from eulerforge.lora.wrap import adapted_modules, unwrap
from eulerforge.models.linear_ops import linear_ops_from
from eulerforge.models.stored import Storage, keep_stored
from eulerforge.testing.fault import Nonconforming, blamed, listed, require
from eulerforge.testing.installed import registry
from eulerforge.testing.probe import TOLERANCE, backward, distance, logits_of, perturb, rounding
from eulerforge.training.checkpoint import load_trained, save_checkpoint
from eulerforge.training.manifest import TrainState

Make: TypeAlias = Callable[[], Any]
Inject: TypeAlias = Callable[[Any], InjectionReport]


def injected(who: str, make: Make, inject: Inject) -> tuple[Any, InjectionReport]:
    """A fresh model with adapters, and the report.

    Raises:
        Nonconforming: the injection raised, adapted nothing, or reports parameters that are not there.
    """
    model = make()
    model.requires_grad_(False)
    with blamed(f"injecting with {who}", "the places must be modules of the layers, and inject must change them"):
        report = inject(model)
    require(bool(report.sites), f"injecting with {who} adapts nothing", "its keywords must reach a place")
    known = {name for name, _ in model.named_parameters()}
    unreal = [name for site in report.sites for name in site.parameters if name not in known]
    require(
        not unreal,
        f"the report of {who} names {listed(unreal)}, no parameter of the model",
        "spell SiteReport.parameters as model.named_parameters() does",
    )
    return model, report


def _backward(who: str, model: Any) -> None:
    with blamed(f"a forward and backward pass with {who}", "forward uses the adapter's parameters, not detached ones"):
        backward(model)


def hold_report(who: str, make: Make, inject: Inject) -> None:
    """The report names exactly what was added, by its real names, with the right counts."""
    before = {name for name, _ in make().named_parameters()}
    model, report = injected(who, make, inject)
    parameters = dict(model.named_parameters())
    added = {name for name in parameters if name.replace(".base_layer.", ".") not in before}
    named = [name for site in report.sites for name in site.parameters]
    twice = sorted({name for name in named if named.count(name) > 1})
    require(not twice, f"the report of {who} names {listed(twice)} twice", "a parameter belongs to one site")
    silent = sorted(added - set(named))
    require(
        not silent,
        f"{who} adds {listed(silent)}, which its report does not name",
        "list every added parameter in SiteReport.parameters, or no phase trains it and no checkpoint keeps it",
    )
    for site in report.sites:
        count = sum(parameters[name].numel() for name in site.parameters)
        require(
            site.parameter_count == count,
            f"the report of {who} counts {site.parameter_count} parameters at {site.path}, which has {count}",
            "SiteReport.parameter_count is the sum of numel() over its parameters",
        )
    narrow = [name for name in named if parameters[name].dtype != torch.float32]
    require(not narrow, f"{who} adds {listed(narrow)} in another precision", "adapters are fp32, small updates vanish")


def hold_identity(who: str, make: Make, inject: Inject) -> None:
    """An injected model computes what it computed before, until it is trained."""
    model, _ = injected(who, make, inject)
    moved = distance(logits_of(model), logits_of(make()))
    require(
        moved <= 1e-6,
        f"{who} changes the output before training, by {moved:.2g} of the largest logit",
        "start one factor at zero (as lora_B), or say starts_as_identity = False",
    )


def hold_frozen_base(who: str, make: Make, inject: Inject) -> None:
    """Only what the report names can train, and a step changes nothing else."""
    model, report = injected(who, make, inject)
    named = {name for site in report.sites for name in site.parameters}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    require(
        trainable <= named,
        f"{who} leaves the base trainable, {listed(sorted(trainable - named))}",
        "the base stays frozen: call requires_grad_ on your own parameters only",
    )
    frozen = sorted(named - trainable)
    require(not frozen, f"{who} adds {listed(frozen)} without requires_grad", "an adapter must be trainable")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    _backward(who, model)
    optimizer.step()
    after = model.state_dict()
    moved = [name for name, old in before.items() if name not in named and not torch.equal(after[name], old)]
    require(not moved, f"a step with {who} changes the base, {listed(moved)}", "nothing of base_layer may be trained")


def hold_gradients(who: str, make: Make, inject: Inject) -> None:
    """Every adapter tensor gets a gradient that is finite and not zero."""
    model, report = injected(who, make, inject)
    perturb(model)
    _backward(who, model)
    parameters = dict(model.named_parameters())
    dead = [
        name
        for site in report.sites
        for name in site.parameters
        if (grad := parameters[name].grad) is None or not bool(grad.any()) or not bool(grad.isfinite().all())
    ]
    require(
        not dead,
        f"no gradient reaches {listed(dead)} with {who}",
        "the adapted module is not used by the model's forward pass, or the adapter detaches its input",
    )


def hold_merge(who: str, make: Make, inject: Inject) -> None:
    """The merged model computes what the live one does, with plain modules only."""
    model, _ = injected(who, make, inject)
    perturb(model)
    live = logits_of(model)
    require(
        distance(live, logits_of(make())) > 1e-3,
        f"the adapters of {who} change nothing however they are set",
        "forward must add what the adapter computes",
    )
    # a sum is rounded in another order: allowed is what the model makes of roundings, never what it makes of a fault
    allowed = max(TOLERANCE, 10 * rounding(model, live))
    with blamed(f"merging after {who}", "merged_weight or merged_part must give a tensor of the base's shape"):
        merge_in_place(model, linear_ops_from(registry()))
    left = [path for path, _ in adapted_modules(model)]
    require(not left, f"the merged model still holds wrappers of {who} at {listed(left)}", "wrap a module once")
    wrong = distance(logits_of(model), live)
    require(
        wrong <= allowed,
        f"merged and live model differ by {wrong:.2g} of the largest logit with {who}",
        "merged_weight must say what forward computes, scaling included",
    )
    require(
        list(model.state_dict()) == list(make().state_dict()),
        f"the merged model has other tensors than the plain one after {who}",
        "put every base layer back in its place",
    )


def hold_unwrap(who: str, make: Make, inject: Inject) -> None:
    """Taking the adapters out gives back the same bits."""
    model, _ = injected(who, make, inject)
    perturb(model)
    logits_of(model)
    unwrap(model)
    plain = make().state_dict()
    state = model.state_dict()
    other = [name for name in plain.keys() | state.keys() if name not in plain or name not in state]
    other += [name for name in plain.keys() & state.keys() if not torch.equal(plain[name], state[name])]
    require(not other, f"unwrapping after {who} does not restore {listed(sorted(other))}", "leave the base untouched")


def hold_reload(who: str, make: Make, inject: Inject, folder: Path) -> None:
    """What a checkpoint keeps gives the same outputs, to the bit, in a model that is injected anew."""
    model, report = injected(who, make, inject)
    names = tuple(name for site in report.sites for name in site.parameters)
    own = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([own[name] for name in names], lr=1e-2)
    perturb(model)
    _backward(who, model)
    optimizer.step()
    with blamed(f"saving and reloading after {who}", "all that trains must be a parameter of an AdaptedModule"):
        saved = save_checkpoint(folder, TrainState(step=1), model, optimizer, report, names)
        again, _ = injected(who, make, inject)
        load_trained(saved, again, names)
    require(
        torch.equal(logits_of(again), logits_of(model)),
        f"a reloaded checkpoint gives other outputs than the model that was saved with {who}",
        "all that trains must be a parameter of an AdaptedModule that the report names",
    )
    lost = sorted(set(names) - adapter_state(model).keys())
    require(not lost, f"{listed(lost)} of {who} is no parameter of an AdaptedModule", "derive the wrapper from it")


def hold_stored(who: str, make: Make, inject: Inject) -> None:
    """Beside weights that are stored as bf16 it computes, trains and merges what it does beside the same in fp32."""

    def model_of(*, stored: bool) -> Any:
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        if stored:
            keep_stored(model, Storage(dtype=torch.bfloat16, loaded=torch.float32, by_file=True))
        return model

    results = []
    for stored in (True, False):
        model, report = injected(who, partial(model_of, stored=stored), inject)
        perturb(model)
        with blamed(
            f"a pass of {who} beside weights stored as bf16",
            "call base_layer and read values through context.linear_ops, or take stored_weights out of StrategySpec",
        ):
            backward(model)
            live = logits_of(model)
        own = dict(model.named_parameters())
        gradients = {name: own[name].grad for site in report.sites for name in site.parameters}
        merge_in_place(model, linear_ops_from(registry()))
        results.append({"logits": live, **gradients, "merged logits": logits_of(model)})
    ours, theirs = results
    wrong = [name for name in theirs if distance(ours[name], theirs[name]) > TOLERANCE]
    require(
        not wrong,
        f"{listed(wrong)} of {who} differ beside weights that are stored as bf16",
        "values of a weight come from context.linear_ops, rounded nowhere",
    )


def hold_one_injection(who: str, make: Make, inject: Inject) -> None:
    """A second injection into the same model is an error, never two adapters on top of each other."""
    model, _ = injected(who, make, inject)
    try:
        inject(model)
    except EulerForgeError:
        return
    except Exception as error:
        raise Nonconforming(
            f"a second injection with {who} raises {type(error).__name__}, {error}: "
            "refuse it with a ModelError, as AdaptedModule does when its base layer is adapted already"
        ) from error
    raise Nonconforming(
        f"a second injection with {who} is not refused: a place must lead to the wrapper, not to the base_layer inside"
    )
