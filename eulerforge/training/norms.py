"""RMS norms in one pass, forward and backward, for the modules that prove to compute one.

Notable: transformers writes an RMS norm as six operations, of which autograd keeps an fp32 copy of the input and a
normalized one; here the input and one number per row are kept, and LoRA layers keep a recipe of the result
(``models/again.py``). Each kind of module (class, width, epsilon) is compared with its own forward and gradient on
random numbers first; what differs is left as it is. A module is not replaced: its instance gets a ``forward`` of its
own, which ``Replaced.remove`` takes away again.
On CUDA the pass is torch's ``rms_norm``, on the CPU the function below; other devices keep their modules.
Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Suffixes of tensor names: N rows, H width, 1 a column.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from eulerforge.models.again import can_be_made_again
from eulerforge.models.room import room
from eulerforge.training.replaced import Replaced, replace_forwards

ONE_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""How far an element may be from the module's own, as a share of it."""


@attrs.frozen
class _Kind:
    """y = x / rms(x) * (weight + offset); ``late`` says that the weight's product comes before the only rounding."""

    offset: float
    late: bool


_KINDS = (_Kind(0.0, late=False), _Kind(0.0, late=True), _Kind(1.0, late=True))


def quicken_norms(model: nn.Module) -> Replaced:
    """Let every norm of the model that proves to be one run in one pass."""
    proven: dict[tuple[object, ...], _Kind | None] = {}

    def forward_for(module: Any) -> Callable[..., Any] | None:
        key = (type(module), module.weight.shape, module.weight.dtype, _epsilon(module))
        if key not in proven:
            proven[key] = _prove(module)
        kind = proven[key]
        return _forward(_epsilon(module), kind) if kind is not None else None

    return replace_forwards(model, _looks_like_one, forward_for, "norms: {} computed in one pass")


def _looks_like_one(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = "RMSNorm" in type(module).__name__ and _epsilon(module) is not None
    return named and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _forward(eps: float | None, kind: _Kind) -> Callable[..., Any]:
    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        weight: Any = self.weight
        plain = x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
        if not plain or weight.requires_grad or torch.compiler.is_compiling():  # the compiler fuses by itself
            return type(self).forward(self, x)
        return _one_pass(x, weight, eps, kind)

    return forward


def _prove(module: nn.Module) -> _Kind | None:
    """The kind that computes what the module does, on random rows and a random weight; None without one."""
    weight: Any = module.weight
    if weight.dtype not in ONE_ROUNDING or weight.device.type not in ("cpu", "cuda"):
        return None
    twin: Any = copy.deepcopy(module).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    twin.weight.copy_(draw(len(weight)))
    x, upstream = (draw(3, 5, len(weight)) * 3).requires_grad_(), draw(3, 5, len(weight))
    try:
        wanted = _with_gradient(twin, x, upstream)
    except (TypeError, RuntimeError):  # it takes more than one tensor
        return None
    share = ONE_ROUNDING[weight.dtype]
    best, fewest = None, x.numel() + 1
    for kind in _KINDS:
        if kind.offset and weight.device.type == "cuda":
            continue  # torch's kernel takes the weight in the input's precision, which 1 + weight would not keep
        pass_of_kind = partial(_one_pass, weight_H=twin.weight, eps=_epsilon(module), kind=kind)
        found = _with_gradient(pass_of_kind, x, upstream)
        value_is = torch.allclose(found[0].float(), wanted[0].float(), rtol=share, atol=share / 64)
        slope_is = float((found[1] - wanted[1]).float().norm()) <= 2 * share * float(wanted[1].float().norm())
        other = int((found[0] != wanted[0]).sum())
        if value_is and slope_is and other < fewest:
            best, fewest = kind, other
    return best


def _with_gradient(norm: Callable[..., Any], x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        y = norm(x)
        return (y.detach(), *torch.autograd.grad(y, x, upstream))


def _one_pass(x: torch.Tensor, weight_H: torch.Tensor, eps: float | None, kind: _Kind) -> torch.Tensor:
    if x.device.type == "cuda":
        norm = partial(F.rms_norm, normalized_shape=weight_H.shape, eps=eps)
        return can_be_made_again(norm(x, weight=weight_H), lambda x, weight_H: norm(x, weight=weight_H), x, weight_H)
    y: torch.Tensor
    y, scale_N1 = _RMSNorm.apply(x, weight_H, eps, kind)
    return can_be_made_again(y, partial(_made_again, kind=kind), x, scale_N1, weight_H)


class _RMSNorm(torch.autograd.Function):
    """The CPU's pass, forward bit for bit what the module computes, and its scale of each row; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: float, kind: _Kind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide_NH = _widened(x)
        squares_NH = torch.mul(wide_NH, wide_NH, out=room("norm product", wide_NH.shape, wide_NH))
        scale_N1 = squares_NH.mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = _rounded(wide_NH, x, scale_N1, weight_H, kind)
        ctx.save_for_backward(x, scale_N1, weight_H)
        ctx.kind = kind
        ctx.mark_non_differentiable(scale_N1)
        ctx.set_materialize_grads(False)
        return y, scale_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, None, None, None
        x, scale_N1, weight_H = ctx.saved_tensors
        width = len(weight_H)
        grad_NH, x_NH = grad.reshape(-1, width), x.reshape(-1, width)
        wide_NH = room("norm", x_NH.shape, scale_N1).copy_(grad_NH).mul_(weight_H.float() + ctx.kind.offset)
        wide_x_NH = room("norm x", x_NH.shape, scale_N1).copy_(x_NH)
        product_NH = room("norm product", x_NH.shape, scale_N1)
        torch.mul(wide_NH, wide_x_NH, out=product_NH)
        # d/dx of x s(x): s g - x s^3 (g . x) / H
        along_N1 = product_NH.sum(-1, keepdim=True).mul_(scale_N1**3).div_(-width)
        wide_NH.mul_(scale_N1).addcmul_(wide_x_NH, along_N1)
        grad_x_NH = torch.empty_like(x_NH, memory_format=torch.contiguous_format).copy_(wide_NH)
        return grad_x_NH.view(x.shape), None, None, None


def _widened(x: torch.Tensor) -> torch.Tensor:
    x_NH = x.reshape(-1, x.shape[-1])
    return room("norm", x_NH.shape, x_NH.new_empty(0, dtype=torch.float32)).copy_(x_NH)


def _rounded(
    wide_NH: torch.Tensor, like: torch.Tensor, scale_N1: torch.Tensor, weight_H: torch.Tensor, kind: _Kind
) -> torch.Tensor:
    """The norm of ``wide_NH``, which is written over, in the shape and the precision of ``like``."""
    wide_NH.mul_(scale_N1)
    y_NH = like.new_empty(wide_NH.shape)
    if kind.late:
        y_NH.copy_(wide_NH.mul_(weight_H.float() + kind.offset))
    else:
        y_NH.copy_(wide_NH).mul_(weight_H)
    # a view made in here could not be changed in place, as a router's jitter does
    y: torch.Tensor = torch.ops.aten._unsafe_view(y_NH, like.shape)
    return y


def _made_again(x: torch.Tensor, scale_N1: torch.Tensor, weight_H: torch.Tensor, kind: _Kind) -> torch.Tensor:
    return _rounded(_widened(x), x, scale_N1, weight_H, kind)
