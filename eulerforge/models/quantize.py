"""One weight made a quantized one: a bitsandbytes layer in the place of a linear one, experts in fewer bits.

bitsandbytes is imported only when a run asks for a quantized base.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

from eulerforge.errors import ModelError
from eulerforge.models.experts import SCALES, StoredExperts, store
from eulerforge.models.quantized import BLOCK, KEY, QuantizationPlan


def import_bitsandbytes() -> Any:
    """bitsandbytes, for a run that asks for it.

    Raises:
        ModelError: it is not installed, or does not work here.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    # on import it warns of a missing kernel for a CPU path that we switch off (see _int4)
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ModelError(
            f"quantized bases need bitsandbytes: {(str(error) or 'it cannot be imported').splitlines()[0]}",
            key=f"{KEY}.mode",
            hint="pip install 'eulerforge-core[qlora]', or use mode = bf16",
        ) from error
    finally:
        log.setLevel(level)


@torch.no_grad()
def quantize_parameter(
    model: nn.Module, name: str, weight: torch.Tensor, plan: QuantizationPlan, device: torch.device
) -> nn.Parameter:
    """Quantize ``weight`` onto ``device`` as the parameter ``name`` of the plan, and give back the parameter.

    A quantized layer takes the place of the plain one, whose own weight may be on the meta device.
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if name in plan.fused:
        parameter = _int8_experts if plan.precision.mode == "int8" else _int4_experts
        return parameter(store(module, plan.dtype), own, weight, plan, device)
    assert isinstance(module, nn.Linear)  # noqa: S101 - the plan was made from the same config
    made = _int8 if plan.precision.mode == "int8" else _int4
    quantized = made(module, weight, plan, device)
    model.set_submodule(path, quantized)
    return quantized.weight  # type: ignore[return-value]


def quantize_loaded(model: nn.Module, plan: QuantizationPlan, device: torch.device) -> None:
    """Quantize a model that is in memory, as one is whose layers share weights."""
    for path in plan.layers:
        quantize_parameter(model, f"{path}.weight", model.get_submodule(path).weight.detach(), plan, device)  # type: ignore[operator,union-attr]
    for name in plan.fused:
        quantize_parameter(model, name, model.get_parameter(name).detach(), plan, device)


def release_files(model: nn.Module) -> None:
    """Copy what is left of the files' own pages: one such weight would keep all in memory, also what was made anew.

    That is what was quantized, and experts, unless the files hold them fused: these stay as they are.
    """
    experts = {id(p) for m in model.modules() if isinstance(m, StoredExperts) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu" and id(parameter) not in experts:
            parameter.data = parameter.data.clone()


def _int4(linear: nn.Linear, weight: torch.Tensor, plan: QuantizationPlan, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    from eulerforge.models.quantized_linear import Int4Linear

    settings = {"compress_statistics": plan.precision.double_quant, "quant_type": plan.precision.quant_type}
    with torch.device("meta"):
        made = Int4Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=plan.dtype,
            **settings,
        )
    made.weight = Params4bit(weight, requires_grad=False, module=made, **settings).to(device)
    made.weight.quant_state.dtype = plan.dtype  # of the products, whatever the file's is
    made.bias = linear.bias
    # with this flag one forward in eval mode repacks the weight in place for AVX512-BF16; gradients, state dict and
    # dequantized weight are wrong from then on, and nothing says so
    made.support_avx512bf16_for_cpu = False
    return made.train(linear.training)


def _int8(linear: nn.Linear, weight: torch.Tensor, plan: QuantizationPlan, device: torch.device) -> nn.Module:
    from eulerforge.models.quantized_linear import Int8Linear

    return Int8Linear.of(linear, weight, device=device, compute_dtype=plan.dtype)


def _int8_experts(
    experts: StoredExperts, name: str, weight_EOI: torch.Tensor, plan: QuantizationPlan, device: torch.device
) -> nn.Parameter:
    """Quantize a fused parameter, one expert after the other: each as a linear layer of its own would be."""
    from bitsandbytes.functional import int8_vectorwise_quant

    rows_EOI = torch.empty(weight_EOI.shape, dtype=torch.int8, device=device)
    scale_EO = torch.empty(weight_EOI.shape[:2], device=device)
    for expert, weight_OI in enumerate(weight_EOI):
        rows_EOI[expert], scale_EO[expert], _ = int8_vectorwise_quant(weight_OI.to(device, torch.float16))
    parameter = nn.Parameter(rows_EOI, requires_grad=False)
    experts.register_parameter(name, parameter)
    experts.register_buffer(name + SCALES, scale_EO)
    return parameter


def _int4_experts(
    experts: StoredExperts, name: str, weight_EOI: torch.Tensor, plan: QuantizationPlan, device: torch.device
) -> nn.Parameter:
    """As in int8; only the double quantization of the constants spans all experts, as where bitsandbytes quantizes
    the whole tensor."""
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    count, out, into = weight_EOI.shape
    packed_E = torch.empty(count, out * into // 2, dtype=torch.uint8, device=device)
    absmax_E = torch.empty(count, out * into // BLOCK, device=device)
    for expert, weight_OI in enumerate(weight_EOI):
        packed, one = quantize_4bit(weight_OI.to(device), blocksize=BLOCK, quant_type=plan.precision.quant_type)
        packed_E[expert], absmax_E[expert] = packed.view(-1), one.absmax
    absmax, nested = absmax_E.view(-1), {}
    if plan.precision.double_quant:
        offset = absmax.mean()
        absmax, second = quantize_blockwise(absmax - offset, blocksize=256)
        nested = {"offset": offset, "state2": second}
    state = QuantState(
        absmax=absmax,
        shape=weight_EOI.shape,
        dtype=plan.dtype,
        blocksize=BLOCK,
        code=one.code,
        quant_type=plan.precision.quant_type,
        **nested,
    )
    parameter = Params4bit(
        packed_E.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=plan.precision.double_quant,
        quant_type=plan.precision.quant_type,
        bnb_quantized=True,
    )
    experts.register_parameter(name, parameter)
    return parameter  # type: ignore[no-any-return]
