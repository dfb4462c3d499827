"""Fused experts of a mixture whose weights are stored in another form than they are multiplied in.

transformers keeps the weights of all experts of a layer in two parameters (experts, out, in). Here each may be in half
precision, int8 or 4 bits: an expert's weight is made as it is multiplied, forward and backward, in memory that all
layers share; on a card those of all experts at once, because products of one expert are too small for it.

Suffixes of tensor names: _N tokens, _K experts per token, _S = N * K pairs sorted by expert, _E experts, _H hidden
size, _R rows of a weight, _I its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from eulerforge.models.grouped import group_ends, grouped_loop, grouped_product
from eulerforge.models.room import WEIGHT, room

GATE_UP, DOWN = "gate_up_proj", "down_proj"
LAYOUT: Mapping[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
"""The flags of transformers' experts, and the values with which we compute what the layer computes."""
WHOLE_BYTES = 1 << 30
"""On a card, up to so many bytes of a layer's weights are made at once."""
SCALES = "_SCB"
"""Ends the name of an int8 parameter's scales (experts, out): those of a row, as bitsandbytes has them."""


def differences(experts: nn.Module) -> list[str]:
    """What of ``LAYOUT`` a module does not have, in words."""
    return [f"{flag} is {value}" for flag, want in LAYOUT.items() if (value := getattr(experts, flag, want)) != want]


def is_known(module: nn.Module) -> bool:
    """Whether a module is transformers' experts in the layout that can be stored otherwise."""
    own = dict(module.named_parameters(recurse=False))
    return (
        own.keys() == {GATE_UP, DOWN}
        and all(weight.ndim == 3 and weight.is_floating_point() for weight in own.values())
        and hasattr(module, "has_gate")
        and not differences(module)
    )


class StoredExperts(nn.Module):
    """What ``store`` puts before the class of a layer's experts; ``compute_dtype`` is the precision of its products."""

    compute_dtype: torch.dtype
    base_class: type[nn.Module]
    num_experts: int

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """The layer's output (N, H), as transformers' grouped products compute it, for ``hidden_states`` (N, H) and
        the router's choice (N, K) and weights."""
        experts_S, order_S = torch.sort(top_k_index.reshape(-1))
        ends_E = group_ends(experts_S, self.num_experts)
        x_SH = hidden_states.to(self.compute_dtype)[order_S // top_k_index.shape[1]]
        gated_S = self._apply_gate(_Product.apply(x_SH, self, GATE_UP, ends_E))  # type: ignore[operator]
        y_SH = _Product.apply(gated_S, self, DOWN, ends_E) * top_k_weights.reshape(-1)[order_S, None]
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return y_SH[places_S].view(*top_k_index.shape, y_SH.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def product(self, name: str, a_SI: torch.Tensor, ends_E: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """Each pair's row times its expert's weight, or with ``transposed`` the weight's transpose, as forward."""
        weight = self.get_parameter(name)
        if weight.dtype == a_SI.dtype:
            return _of_whole(a_SI, weight, ends_E, transposed)
        experts, out, into = shape_of(self, name)
        fits = experts * out * into * a_SI.itemsize <= WHOLE_BYTES
        # a new token needs few of the experts
        if a_SI.device.type != "cpu" and fits and len(a_SI) >= experts:
            return _of_whole(a_SI, self.whole(name, a_SI.dtype), ends_E, transposed)
        read = self._reader(name)

        def matrix(expert: int) -> torch.Tensor:
            weight_OI = room(WEIGHT, (out, into), a_SI)
            read(expert * out, weight_OI)
            return weight_OI.t() if transposed else weight_OI

        return grouped_loop(a_SI, out if transposed else into, ends_E, matrix)

    @torch.no_grad()
    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weights of all experts as a tensor of its own, (experts, out, in)."""
        shape = shape_of(self, name)
        made = torch.empty(shape, dtype=dtype, device=self.get_parameter(name).device)
        self._reader(name)(0, made.view(-1, shape[2]))
        return made

    def plain(self) -> None:
        """Make this transformers' module again, in place, its weights stored as they are multiplied."""
        for name, weight in list(self.named_parameters(recurse=False)):
            if not weight.is_floating_point():
                self.register_parameter(name, nn.Parameter(self.whole(name, self.compute_dtype), requires_grad=False))
                self._buffers.pop(name + SCALES, None)
        self.widen()

    def widen(self) -> None:
        """As ``plain``, but of the half-precision weights alone: what is quantized stays so."""
        weights = list(self.parameters(recurse=False))
        for weight in weights:
            if weight.is_floating_point():  # the same object, which a phase may train
                weight.data = weight.detach().to(self.compute_dtype)
        if all(weight.is_floating_point() for weight in weights):
            self.__class__ = self.base_class  # type: ignore[assignment]

    def _reader(self, name: str) -> Callable[[int, torch.Tensor], None]:
        """A function that writes rows of the weight, seen as (experts * out, in), from one on into a tensor (R, I)."""
        weight = self.get_parameter(name).detach()
        if (state := getattr(self.get_parameter(name), "quant_state", None)) is not None:
            from eulerforge.models.quantized_linear import absmax_of, int4_rows_into

            absmax = absmax_of(state)
            return lambda first, out_RI: int4_rows_into(weight, absmax, state, first, out_RI)
        rows = weight.flatten(0, 1)
        if weight.dtype == torch.int8:
            from eulerforge.models.quantized_linear import int8_rows_into

            scales = self.get_buffer(name + SCALES).flatten()
            return lambda first, out_RI: int8_rows_into(
                rows[first : first + len(out_RI)], scales[first : first + len(out_RI)], out_RI
            )

        def widen_into(first: int, out_RI: torch.Tensor) -> None:
            out_RI.copy_(rows[first : first + len(out_RI)])

        return widen_into

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With what a 4-bit weight needs beside its own tensor, under bitsandbytes' names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.named_parameters(recurse=False):
            if (state := getattr(weight, "quant_state", None)) is not None:
                for key, value in state.as_dict(packed=True).items():
                    destination[f"{prefix}{name}.{key}"] = value if keep_vars else value.detach()

    def extra_repr(self) -> str:
        stored = {name: str(weight.dtype) for name, weight in self.named_parameters(recurse=False)}
        return f"{super().extra_repr()}stored={stored}, compute_dtype={self.compute_dtype}"


class _Product(torch.autograd.Function):
    """``StoredExperts.product``, whose weights get no gradient: they are made again for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a_SI: torch.Tensor, experts: StoredExperts, name: str, ends_E: torch.Tensor
    ) -> torch.Tensor:
        ctx.experts, ctx.name = experts, name
        ctx.save_for_backward(ends_E)
        return experts.product(name, a_SI, ends_E, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.experts.product(ctx.name, grads[0], *ctx.saved_tensors, transposed=False), None, None, None


def store(experts: nn.Module, compute_dtype: torch.dtype) -> StoredExperts:
    """Make a module that ``is_known`` one whose weights may be stored in another form, in place."""
    if not isinstance(experts, StoredExperts):
        experts.__class__ = _stored_class(type(experts))  # type: ignore[arg-type]
    assert isinstance(experts, StoredExperts)  # noqa: S101 - made so above
    experts.compute_dtype = compute_dtype
    return experts


@cache
def _stored_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Stored{base.__name__}", (StoredExperts, base), {"base_class": base})


def shape_of(experts: nn.Module, name: str) -> tuple[int, int, int]:
    """Experts, out and in of a fused parameter, whatever it is stored in."""
    count, out, into = stored_shape(experts.get_parameter(name))
    return count, out, into


def stored_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of what a parameter stands for: one in 4 bits has another of its own."""
    return tuple(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def compute_dtype_of(experts: nn.Module) -> torch.dtype:
    """The precision in which experts are multiplied."""
    return experts.compute_dtype if isinstance(experts, StoredExperts) else experts.get_parameter(GATE_UP).dtype


def experts_product(
    experts: nn.Module, name: str, a_SI: torch.Tensor, ends_E: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """``StoredExperts.product`` of any experts."""
    if isinstance(experts, StoredExperts):
        return experts.product(name, a_SI, ends_E, transposed=transposed)
    return _of_whole(a_SI, experts.get_parameter(name), ends_E, transposed)


def _of_whole(a_SI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor, transposed: bool) -> torch.Tensor:
    return grouped_product(a_SI, weight_EOI.transpose(1, 2) if transposed else weight_EOI, ends_E)
