"""The shapes of the objects behind a spec's target; all are stateless.

They are checked by shape, not by inheritance: a plugin needs no base class of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from eulerforge.api.report import InjectionReport, Site


@runtime_checkable
class BackboneAdapter(Protocol):
    """Where: the layers of a model family, the places in a layer, and what the family calls them."""

    default_keywords: Sequence[str]
    """The keywords that this family's users mean when they name none."""

    def find_transformer_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All decoder layers, in order; never those of a vision tower."""
        ...

    def find_sites(self, layer: nn.Module) -> Sequence[Site]:
        """Every place in one layer where something can be injected, each with its path in the layer and its role."""
        ...

    def find_routers(self, layer: nn.Module) -> Sequence[str]:
        """Names of the layer's router parameters, relative to the layer; empty for a dense layer."""
        ...

    def roles_of(self, keyword: str) -> Sequence[str]:
        """The roles that a user's keyword means in this family; empty when it is not a keyword of this family."""
        ...


@runtime_checkable
class SequenceMixerFinder(Protocol):
    """What an adapter offers besides, when its spec's ``isolation`` is ``gather``; no part of ``BackboneAdapter``, so
    that an adapter without it stays one."""

    def find_sequence_mixers(self, layer: nn.Module) -> Sequence[str]:
        """Paths in a layer of the modules other than attention through which tokens meet, such as ``linear_attn``.

        Each takes hidden states of shape (rows, tokens, width) first, or as ``hidden_states``, gives back one tensor of
        the same shape, and is causal. They get a packed row's documents as rows padded on the right.
        """
        ...


@runtime_checkable
class LinearOps(Protocol):
    """How to read the weight of one kind of linear module (plain, 4-bit, 8-bit, third-party) and to merge into it."""

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        """The weight as fp32, shape (out_features, in_features)."""
        ...

    def plain(self, module: nn.Module, weight: torch.Tensor) -> nn.Module:
        """A plain linear module with this fp32 weight of shape (out_features, in_features) and the module's bias.

        It may be ``module`` itself, written to in place, when its format holds floating-point weights; a quantized
        weight is never quantized again, because the rounding would swallow most of what training added.
        """
        ...


@attrs.frozen(kw_only=True)
class InjectionContext:
    """What a strategy may know of the run: ``linear_ops`` gives the weight operations of a module, ``seed`` the seed
    from which it draws its initial values."""

    seed: int
    linear_ops: Callable[[nn.Module], LinearOps]
    partial_ok: bool = False


@runtime_checkable
class InjectionStrategy(Protocol):
    """What: changes the model in place and reports every place that it changed."""

    def inject(
        self, model: nn.Module, adapter: BackboneAdapter, config: Any, context: InjectionContext
    ) -> InjectionReport:
        """Inject into ``model`` in place."""
        ...


@runtime_checkable
class PhaseGroupResolver(Protocol):
    """When: which parameters a group's name stands for."""

    def resolve(
        self, model: nn.Module, adapter: BackboneAdapter, report: InjectionReport
    ) -> Mapping[str, Sequence[str]]:
        """Parameter names per group, as ``model.named_parameters()`` spells them; groups are disjoint."""
        ...


PROTOCOLS: dict[str, type] = {
    "backbone": BackboneAdapter,
    "strategy": InjectionStrategy,
    "phase_group": PhaseGroupResolver,
}
