"""Gated MLPs, ``down(act(gate(x)) * up(x))``, that keep two of their four wide tensors.

Notable: autograd keeps gate, up, the activation and the product; the last two are elementwise passes over the first
two. Here the backward pass makes them again, with the operations of autograd, so every bit stays the same. The MLP is
the widest part of a layer: with this and the norms' recipes (``models/again.py``) a layer of Llama 8B keeps 99 KB per
token where it kept 169.
Each kind of MLP is compared with its own forward on random numbers first; what differs is left as it is.
Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import attrs
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from eulerforge.models.again import can_be_made_again
from eulerforge.models.hooks import is_hooked
from eulerforge.training.replaced import Replaced, replace_forwards

_PARTS = ("gate_proj", "up_proj", "down_proj")


@attrs.frozen
class _Activation:
    """An elementwise function into ``out``, and its gradient from that of its result and its input."""

    value: Callable[..., torch.Tensor]
    slope: Callable[..., torch.Tensor]


def _gelu(approximate: str) -> _Activation:
    aten = torch.ops.aten
    return _Activation(
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x: aten.gelu_backward(grad, x, approximate=approximate),
    )


_ACTIVATIONS = (
    _Activation(lambda x, out: torch.ops.aten.silu.out(x, out=out), torch.ops.aten.silu_backward),
    _gelu("tanh"),
    _gelu("none"),
)


def lean_mlps(model: nn.Module) -> Replaced:
    """Let every gated MLP of the model that proves to be one keep less."""

    def forward_for(module: Any) -> Callable[..., Any] | None:
        activation = _prove(module)
        return _forward(type(module.act_fn), activation) if activation is not None else None

    return replace_forwards(model, _looks_like_one, forward_for, "gated MLPs: {} keep two of four tensors")


def _looks_like_one(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in (*_PARTS, "act_fn"))


def _prove(module: nn.Module) -> _Activation | None:
    """The activation with which ``_Gated`` computes what the module's class does; None without one."""
    act_fn: Any = module.act_fn
    if list(act_fn.parameters()) or _hooked(act_fn):
        return None
    precisions = (torch.float32, torch.bfloat16)
    return next((one for one in _ACTIVATIONS if all(_same(module, one, dtype) for dtype in precisions)), None)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes what the module is given or gives, or one below it."""
    return any(map(is_hooked, module.modules()))


@torch.no_grad()
def _same(module: nn.Module, activation: _Activation, dtype: torch.dtype) -> bool:
    twin: Any = copy.copy(module)
    parts, x = _narrow(dtype)
    others = {name: copy.deepcopy(part) for name, part in module._modules.items() if name not in parts}
    twin._modules = {**parts, **others}
    twin.train()  # a dropout shows: what it keeps is larger
    try:
        with torch.random.fork_rng(devices=[]):
            own = type(twin).forward(twin, x)
    except Exception:  # noqa: BLE001 - it takes more, or uses its parts otherwise; code of the model's own may raise any
        return False
    if not isinstance(own, torch.Tensor) or own.dtype != dtype:
        return False
    return torch.equal(own, twin.down_proj(_product(twin.gate_proj(x), twin.up_proj(x), activation)))


@cache
def _narrow(dtype: torch.dtype) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """Layers in the places of an MLP's own, so that no weight of the model is read, and rows for them."""
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, nn.Module] = {}
    for name, (into, out) in zip(_PARTS, ((8, 24), (8, 24), (24, 8)), strict=True):
        parts[name] = linear = nn.Linear(into, out, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.randn(out, into, generator=generator).to(dtype), requires_grad=False)
    return parts, torch.randn(2, 5, 8, generator=generator).to(dtype)


def _forward(kind: type[nn.Module], activation: _Activation) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        own = not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        # the compiler fuses by itself; and whoever changes the activation later is right
        if own or torch.compiler.is_compiling() or type(self.act_fn) is not kind or _hooked(self.act_fn):
            return type(self).forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype or gate.shape != up.shape:
            return self.down_proj(self.act_fn(gate) * up)
        again = _Again(activation)
        y = _Gated.apply(gate, up, again)
        return self.down_proj(can_be_made_again(y, again.product, gate, up))

    return forward


def _product(gate: torch.Tensor, up: torch.Tensor, activation: _Activation) -> torch.Tensor:
    return activation.value(gate, out=torch.empty_like(gate)).mul_(up)


class _Again:
    """One pass's activation in the backward pass: the next layer makes it for the product, ``_Gated`` needs it then."""

    def __init__(self, activation: _Activation) -> None:
        self.activation = activation
        self._made: torch.Tensor | None = None

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self._made = self.activation.value(gate, out=torch.empty_like(gate))
        return self._made * up

    def activated(self, gate: torch.Tensor) -> torch.Tensor:
        """It may be written over."""
        made, self._made = self._made, None
        return made if made is not None else self.activation.value(gate, out=torch.empty_like(gate))


class _Gated(torch.autograd.Function):
    """act(gate) * up, each (..., W)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, again: _Again) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.again = again
        return _product(gate, up, again.activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        activated = ctx.again.activated(gate)
        grad_up = grad * activated if ctx.needs_input_grad[1] else None
        grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_gate = ctx.again.activation.slope(torch.mul(grad, up, out=activated), gate)
        return grad_gate, grad_up, None
