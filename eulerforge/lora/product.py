"""The two matrix products of a LoRA layer, forward and backward, with nothing kept that backward does not need.

``low_rank`` is the low-rank path alone. ``augmented`` is base and path in **one** product with one rounding:
y = [x | d(x) A^T] @ [W | s B]^T, and backward [gx | gl] = g @ [W | s B]. In bf16 that is more than speed: the sum
base(x) + path(x) adds to a number that is rounded already, and an update below half a unit in its last place is lost.
A base that is quantized, or stored in another precision, is the same product on the CPU: W is written into a room,
forward and again backward.
Kept from forward to backward: x (which the layers beside it keep too) or what it can be made of again, the path's r
columns, and the dropout mask, as bits on the CPU and as the number that it is a function of elsewhere.
Suffixes of tensor names: N rows, I in_features, O out_features, R rank, _NIR: I and R side by side in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from eulerforge.lora.dropout import draw_seed, fold, keep_mask, keep_share, masked, unfold
from eulerforge.models.again import Recipe, recipe_of
from eulerforge.models.room import WEIGHT, room

Fill = Callable[[torch.Tensor], None]
"""Writes a base weight into the tensor (O, I) that it gets."""


def low_rank(x: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float, dropout: float) -> torch.Tensor:
    """``scaling * dropout(x) A^T B^T`` in x's precision; x is (..., I), the result (..., O)."""
    seed = draw_seed() if dropout else 0
    update: torch.Tensor = _Product.apply(x, A_RI, B_OR, None, None, scaling, dropout, seed, recipe_of(x))
    return update


def augmented(
    x: torch.Tensor,
    A_RI: torch.Tensor,
    B_OR: torch.Tensor,
    weight: torch.Tensor | Fill,
    bias_O: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` in one product.

    Args:
        weight: frozen, in x's precision: a tensor (O, I + R) with W in its first I columns, of which the last R are
            overwritten with s B; or what writes W into a tensor.
    """
    seed = draw_seed() if dropout else 0
    y: torch.Tensor = _Product.apply(x, A_RI, B_OR, weight, bias_O, scaling, dropout, seed, recipe_of(x))
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A_RI: torch.Tensor,
        B_OR: torch.Tensor,
        weight: torch.Tensor | Fill | None,
        bias_O: torch.Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        inputs = A_RI.shape[1]
        x_NI = x.reshape(-1, inputs)
        ctx.scaling, ctx.dropout, ctx.seed, ctx.weight, ctx.shape = scaling, dropout, seed, weight, x.shape
        dropped_NI, bits = x_NI, None
        if dropout:
            mask_NI = keep_mask(x_NI.shape, dropout, seed, x.device)
            dropped_NI = masked(x_NI, mask_NI, room("dropped", x_NI.shape, x_NI))
            bits = fold(mask_NI)
        low_NR = dropped_NI @ _compensated(A_RI, dropout, x.dtype).T
        ctx.maker = recipe.taken() if recipe is not None and ctx.needs_input_grad[1] else None
        of_x = (x,) if recipe is None else recipe.ingredients
        ctx.save_for_backward(A_RI, B_OR, low_NR, bits, *(of_x if ctx.needs_input_grad[1] else ()))
        if weight is None:
            y_NO = low_NR @ (B_OR * scaling).to(x.dtype).T
        else:
            weight_OIR = weight if isinstance(weight, torch.Tensor) else _filled(weight, A_RI, B_OR, x)
            torch.mul(B_OR, scaling, out=weight_OIR[:, inputs:])
            # a copy of x costs a hundredth of the product
            joined_NIR = _aligned_room("joined", len(x_NI), weight_OIR.shape[1], x_NI)
            y_NO = F.linear(torch.cat([x_NI, low_NR], dim=1, out=joined_NIR), weight_OIR, bias_O)
        # a view made in here could not be changed in place, as a linear layer's result can
        y: torch.Tensor = torch.ops.aten._unsafe_view(y_NO, (*x.shape[:-1], len(B_OR)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        A_RI, B_OR, low_NR, bits, *of_x = ctx.saved_tensors
        wants_x, wants_A, wants_B = ctx.needs_input_grad[:3]
        grad_NO = grad.reshape(-1, len(B_OR))
        # in this order a CPU is up to ten times faster than in the other (fp32, ranks 2 to 8)
        grad_B_OR = ((low_NR.T @ grad_NO).T.to(B_OR.dtype) * ctx.scaling).contiguous() if wants_B else None
        if not (wants_x or wants_A):
            return None, None, grad_B_OR, None, None, None, None, None, None

        base_NI, weight = None, ctx.weight
        shape_NI = (len(grad_NO), A_RI.shape[1])
        inputs = shape_NI[1]
        if weight is None or not wants_x:
            grad_low_NR = grad_NO @ (B_OR * ctx.scaling).to(low_NR.dtype)
        else:
            if not isinstance(weight, torch.Tensor):
                weight = _filled(weight, A_RI, B_OR, low_NR)
                torch.mul(B_OR, ctx.scaling, out=weight[:, inputs:])
            grad_NIR = _aligned_room("joined", len(grad_NO), weight.shape[1], low_NR)
            torch.mm(grad_NO, weight, out=grad_NIR)
            base_NI, grad_low_NR = grad_NIR[:, :inputs], grad_NIR[:, inputs:]

        mask_NI = None
        if bits is not None:
            mask_NI = unfold(bits, shape_NI)
        elif ctx.dropout:
            mask_NI = keep_mask(shape_NI, ctx.dropout, ctx.seed, grad.device)
        grad_A_RI = None
        if wants_A:
            x = of_x[0] if ctx.maker is None else ctx.maker.tensor(*of_x)
            dropped_NI = x.reshape(shape_NI)
            if mask_NI is not None:
                dropped_NI = masked(dropped_NI, mask_NI, room("dropped", shape_NI, low_NR))
            grad_A_RI = (grad_low_NR.T @ dropped_NI).to(A_RI.dtype) / keep_share(ctx.dropout)
        grad_x = None
        if wants_x:
            grad_x_NI = low_NR.new_empty(shape_NI)
            path_NI = grad_x_NI if base_NI is None else room("dropped", shape_NI, low_NR)
            torch.mm(grad_low_NR, _compensated(A_RI, ctx.dropout, low_NR.dtype), out=path_NI)
            if mask_NI is not None:
                masked(path_NI, mask_NI, path_NI)
            if base_NI is not None:
                torch.add(path_NI, base_NI, out=grad_x_NI)
            grad_x = grad_x_NI.view(ctx.shape)
        return grad_x, grad_A_RI, grad_B_OR, None, None, None, None, None, None


def _filled(fill: Fill, A_RI: torch.Tensor, B_OR: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[W | .] in a room, in ``like``'s precision."""
    weight_OIR = _aligned_room(WEIGHT, len(B_OR), A_RI.shape[1] + len(A_RI), like)
    fill(weight_OIR[:, : A_RI.shape[1]])
    return weight_OIR


def _aligned(columns: int) -> int:
    """As many numbers as a row is apart from the next: a multiple of 8, so that in half precision each row begins at a
    multiple of 16 bytes, without which a GPU has no fast kernels for the whole product."""
    return columns + -columns % 8


def aligned_empty(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, columns) in ``like``'s precision and on its device."""
    return like.new_empty(rows, _aligned(columns))[:, :columns]


def _aligned_room(name: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return room(name, (rows, _aligned(columns)), like)[:, :columns]


def _compensated(A_RI: torch.Tensor, dropout: float, dtype: torch.dtype) -> torch.Tensor:
    """A over the share that dropout keeps, in ``dtype``: r rows to scale instead of x's N."""
    return (A_RI / keep_share(dropout) if dropout else A_RI).to(dtype)
