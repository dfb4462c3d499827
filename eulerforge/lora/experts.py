"""LoRAExperts: a low-rank path for each expert of a mixture whose experts are fused into bare parameters.

The layer's own dispatch, row for row: pairs of token and expert are sorted by expert, each group is multiplied by its
expert's weight and, beside it, by the two thin matrices of its path.
Notable: the full delta (experts, out, in) is never built, and one autograd function covers the whole layer, so that
for each pair only what the gate needs is kept for backward; all else is computed again from the layer's input.

Suffixes of tensor names: _N tokens, _K experts per token, _S = N * K pairs sorted by expert, _E experts, _H hidden
size, _I what ``gate_up_proj`` gives, _J what ``down_proj`` takes, _R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from eulerforge.errors import ModelError
from eulerforge.lora.adapted import AdaptedModule, Index
from eulerforge.models.experts import (
    DOWN,
    GATE_UP,
    StoredExperts,
    compute_dtype_of,
    differences,
    experts_product,
    shape_of,
)
from eulerforge.models.grouped import group_ends, grouped_outer, grouped_product

_ROWS = 512
"""Rows that are added at once where precisions differ."""


class ExpertsPath(nn.Module):
    """The low-rank path beside a layer's fused parameter: ``lora_A`` (E, r, in), ``lora_B`` (E, out, r), both fp32."""

    def __init__(
        self, layer: nn.Module, name: str, *, r: int, scaling: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        experts, self.out_features, self.in_features = shape_of(layer, name)
        self.r, self.scaling = r, scaling
        device = layer.get_parameter(name).device
        # drawn on the CPU, as in LoRALinear; every expert starts as a linear layer of its own would
        init = torch.empty(experts * r, self.in_features, device="meta" if device.type == "meta" else "cpu")
        if device.type != "meta":
            nn.init.kaiming_uniform_(init, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(init.view(experts, r, self.in_features).to(device))
        self.lora_B = nn.Parameter(torch.zeros(experts, self.out_features, r, device=device))

    @torch.no_grad()
    def delta(self, experts: slice = slice(None), rows: slice = slice(None)) -> torch.Tensor:
        """scaling * lora_B @ lora_A in fp32 for some experts and output rows, shape (experts, rows, in)."""
        return (self.lora_B[experts, rows].float() @ self.lora_A[experts].float()) * self.scaling

    def extra_repr(self) -> str:
        experts = self.lora_A.shape[0]
        return (
            f"experts={experts}, in={self.in_features}, out={self.out_features}, r={self.r}, scaling={self.scaling:g}"
        )


class LoRAExperts(AdaptedModule):
    """The experts of one layer, frozen, with a low-rank path beside ``gate_up_proj``, ``down_proj``, or both.

    The paths are the submodules of these names.
    ``lora_B`` is zero at the start, and the module then computes exactly what its base layer computes with the grouped
    products that are transformers' default; its other expert implementations round differently.

    Args:
        base_layer: transformers' experts: parameters ``gate_up_proj`` (E, I, H), ``down_proj`` (E, H, J).
        parameters: which of the two get a path.
        r, alpha, dropout, use_rslora: as in ``LoRALinear``; dropout draws for each pair of token and expert.
        generators: the CPU random source of a path's initial ``lora_A``, by the parameter's name.

    Raises:
        ModelError: the experts have another layout (biases, transposed weights), or are adapted already.
    """

    trains_base = False

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        parameters: Sequence[str] = (GATE_UP, DOWN),
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> None:
        super().__init__(base_layer)
        refuse_other_layout(base_layer, parameters)
        if r < 1:
            raise ValueError(f"r must be at least 1, not {r}")
        self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, dropout, use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.num_experts = shape_of(base_layer, GATE_UP)[0]
        for name in parameters:
            generator = (generators or {}).get(name)
            setattr(self, name, ExpertsPath(base_layer, name, r=r, scaling=self.scaling, generator=generator))

    @property
    def paths(self) -> dict[str, ExpertsPath]:
        """The paths by the name of the parameter that each stands beside."""
        return {name: module for name, module in self.named_children() if isinstance(module, ExpertsPath)}

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        return tuple(self.paths)

    def merged_part(self, name: str, base: torch.Tensor, index: Index = ()) -> torch.Tensor:
        return base + self.paths[name].delta(*index).to(base.device)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """The layer's output, shape (N, H), for ``hidden_states`` (N, H) and the router's choice (N, K) and weights."""
        dtype = compute_dtype_of(self.base_layer)
        # from the CPU's generator: the run's seed governs it, and activation checkpointing draws it again alike
        drops = self.dropout > 0 and self.training
        seed = int(torch.randint(2**62, (1,), device="cpu")) if drops else None
        tensors = [t for name in (GATE_UP, DOWN) for t in _tensors(self.paths.get(name))]
        out_NH = _Dispatch.apply(hidden_states.to(dtype), top_k_weights, top_k_index, self, seed, *tensors)
        return out_NH.to(hidden_states.dtype)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, scaling={self.scaling:g}"


def refuse_other_layout(base_layer: nn.Module, parameters: Sequence[str]) -> None:
    """Refuse experts that ``LoRAExperts`` would compute wrongly.

    Raises:
        ModelError: it names what differs.
    """
    kind = type(base_layer).__name__
    own = dict(base_layer.named_parameters(recurse=False))
    if unknown := sorted({GATE_UP, DOWN, *parameters} - own.keys()) or sorted(set(parameters) - {GATE_UP, DOWN}):
        raise ModelError(
            f"{kind} has no parameter {unknown[0]} that LoRA on experts knows",
            hint="leave the experts out of injection.target_keywords",
        )
    wrong = differences(base_layer)
    if not isinstance(base_layer, StoredExperts):
        unread = (name for name, weight in own.items() if not weight.is_floating_point())
        wrong += [f"{name} is stored as {own[name].dtype}" for name in unread]
    if wrong:
        raise ModelError(
            f"LoRA on experts does not know the layout of {kind}: {', '.join(wrong)}",
            hint="take the feed-forward keywords out, or give the backbone a strategy of its own",
        )


def _tensors(path: ExpertsPath | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if path is None else (path.lora_A, path.lora_B)


class _Low:
    """One path in its compute dtype; ``scaling`` is in ``B_EOR``, and what dropout leaves is made up for in ``A_ERI``:
    in half precision the mask could not carry it.

    On the CPU that is fp32: the thin products cost little, and oneDNN would build and keep a bf16 kernel for every
    number of rows that an expert ever gets.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scaling: float, keep: float, dtype: torch.dtype) -> None:
        self.scaling, self.keep = scaling, keep
        self.dtype = torch.promote_types(dtype, torch.float32) if A.device.type == "cpu" else dtype
        self.A_ERI, self.B_EOR = (A / keep).to(self.dtype), (B * scaling).to(self.dtype)

    def forward(self, x_SI: torch.Tensor, ends_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The low-rank values (S, r) and the path's output (S, out)."""
        low_SR = grouped_product(x_SI.to(self.dtype), self.A_ERI.transpose(1, 2), ends_E)
        return low_SR, grouped_product(low_SR, self.B_EOR.transpose(1, 2), ends_E)


def _mask(seed: int | None, which: int, like: torch.Tensor, dropout: float) -> torch.Tensor | None:
    """The dropout mask of path ``which`` (0 or 1), 0 or 1; the same in forward and backward because of its seed."""
    if seed is None:
        return None
    generator = torch.Generator(like.device).manual_seed(seed + which)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator)


def _dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


class _Dispatch(torch.autograd.Function):
    """The whole layer, forward and backward; the base weights get no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_NH: torch.Tensor,
        weights_NK: torch.Tensor,
        index_NK: torch.Tensor,
        layer: LoRAExperts,
        seed: int | None,
        *adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        base, (up, down) = layer.base_layer, _lows(layer, adapters, seed, x_NH.dtype)
        experts_S, order_S = torch.sort(index_NK.reshape(-1))
        ends_E = group_ends(experts_S, layer.num_experts)
        x_SH = x_NH[order_S // index_NK.shape[1]]
        gate_up_SI = experts_product(base, GATE_UP, x_SH, ends_E, transposed=True)
        low_up_SR = low_down_SR = None
        if up is not None:
            low_up_SR, added_SI = up.forward(_dropped(x_SH, _mask(seed, 0, x_SH, layer.dropout)), ends_E)
            _add(gate_up_SI, added_SI)
            del added_SI
        h_SJ = base._apply_gate(gate_up_SI)  # type: ignore[operator]
        y_SH = experts_product(base, DOWN, h_SJ, ends_E, transposed=True)
        if down is not None:
            low_down_SR, added_SH = down.forward(_dropped(h_SJ, _mask(seed, 1, h_SJ, layer.dropout)), ends_E)
            _add(y_SH, added_SH)
        ctx.layer, ctx.seed = layer, seed
        ctx.save_for_backward(x_NH, weights_NK, order_S, ends_E, gate_up_SI, low_up_SR, low_down_SR, *adapters)
        return _sum_over_experts(y_SH * weights_NK.reshape(-1)[order_S, None], order_S, weights_NK.shape).to(x_NH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, seed = ctx.layer, ctx.seed
        x_NH, weights_NK, order_S, ends_E, gate_up_SI, low_up_SR, low_down_SR, *adapters = ctx.saved_tensors
        base, (up, down) = layer.base_layer, _lows(layer, adapters, seed, x_NH.dtype)
        rows_S = order_S // weights_NK.shape[1]
        w_S1 = weights_NK.reshape(-1)[order_S, None]
        grads: list[torch.Tensor | None] = [None, None, None, None]

        with torch.enable_grad():
            leaf_SI = gate_up_SI.detach().requires_grad_()
            gated_SJ = base._apply_gate(leaf_SI)
        h_SJ = gated_SJ.detach()
        g_SH = grad_outputs[0][rows_S]
        # before the router's weight: its inner product with h is that weight's gradient, so the output is not kept
        t_SJ = experts_product(base, DOWN, g_SH, ends_E, transposed=False)
        if down is not None:
            mask = _mask(seed, 1, h_SJ, layer.dropout)
            wide_SH = g_SH.to(down.dtype)
            u_SR = grouped_product(wide_SH, down.B_EOR, ends_E)
            _add(t_SJ, _dropped(grouped_product(u_SR, down.A_ERI, ends_E), mask))
            dropped_SJ = _dropped(h_SJ, mask).to(down.dtype)
            grads[2] = grouped_outer((u_SR * w_S1).to(down.dtype), dropped_SJ, ends_E).float() / down.keep
            weighted_SR = (low_down_SR * (w_S1 * down.scaling)).to(down.dtype)
            grads[3] = grouped_outer(wide_SH, weighted_SR, ends_E).float()
            del wide_SH, dropped_SJ
        del g_SH
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_S = (t_SJ.float() * h_SJ.float()).sum(-1).to(weights_NK.dtype)
            grad_weights = torch.empty_like(grad_S).index_copy_(0, order_S, grad_S).view(weights_NK.shape)
        (g_SI,) = torch.autograd.grad(gated_SJ, leaf_SI, (t_SJ * w_S1).to(x_NH.dtype))
        del t_SJ, h_SJ, gated_SJ, leaf_SI

        if up is not None:
            wide_SI = g_SI.to(up.dtype)
            u_SR = grouped_product(wide_SI, up.B_EOR, ends_E)
            grads[1] = grouped_outer(wide_SI, low_up_SR * up.scaling, ends_E).float()
            x_SH = x_NH[rows_S]
            mask = _mask(seed, 0, x_SH, layer.dropout)
            grads[0] = grouped_outer(u_SR, _dropped(x_SH, mask).to(up.dtype), ends_E).float() / up.keep
            del x_SH, wide_SI
        grad_x = None
        if ctx.needs_input_grad[0]:
            gx_SH = experts_product(base, GATE_UP, g_SI, ends_E, transposed=False)
            if up is not None:
                _add(gx_SH, _dropped(grouped_product(u_SR, up.A_ERI, ends_E), mask))
            grad_x = _sum_over_experts(gx_SH, order_S, weights_NK.shape)
        return (grad_x, grad_weights, None, None, None, *grads)


def _lows(
    layer: LoRAExperts, adapters: Sequence[torch.Tensor | None], seed: int | None, dtype: torch.dtype
) -> list[_Low | None]:
    pairs = ((adapters[0], adapters[1]), (adapters[2], adapters[3]))
    keep = 1.0 if seed is None else 1.0 - layer.dropout
    return [None if A is None or B is None else _Low(A, B, layer.scaling, keep, dtype) for A, B in pairs]


def _add(total_SO: torch.Tensor, part_SO: torch.Tensor) -> None:
    """Add in place; on the CPU in blocks of rows, where torch makes whole fp32 copies if the precisions differ."""
    rows = _ROWS if total_SO.device.type == "cpu" and total_SO.dtype != part_SO.dtype else max(1, len(total_SO))
    for some, more in zip(total_SO.split(rows), part_SO.split(rows), strict=True):
        some += more


def _sum_over_experts(rows_SH: torch.Tensor, order_S: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sorted rows back in the tokens' order and summed over each token's experts: shape (N, H)."""
    unsorted = torch.empty_like(rows_SH)
    unsorted[order_S] = rows_SH
    return unsorted.view(*shape, rows_SH.shape[1]).sum(dim=1)
