"""A loaded base made a quantized one: bitsandbytes' layers in the places of linear ones, and experts in fewer bits.

Linear layers and the fused experts of a mixture are quantized one by one after the checkpoint is in memory.
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
    # on import it warns of a missing kernel for a CPU path that we switch off (see replace_layers)
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
def replace_layers(model: nn.Module, plan: QuantizationPlan, device: torch.device) -> None:
    """Quantize the plan's layers in place, each onto ``device``; the plain weight is freed before the next."""
    import_bitsandbytes()
    for path in plan.layers:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)  # noqa: S101 - the plan was made from the same config
        made = _int8(linear, plan, device) if plan.precision.mode == "int8" else _int4(linear, plan, device)
        model.set_submodule(path, made)
    for path in plan.fused:
        module, _, name = path.rpartition(".")
        _quantize_experts(store(model.get_submodule(module), plan.dtype), name, plan, device)
    # one weight that is still the file's own pages would keep all of them in memory, the quantized ones too
    for parameter in model.parameters() if device.type == "cpu" else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _int4(linear: nn.Linear, plan: QuantizationPlan, device: torch.device) -> nn.Module:
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
    weight = linear.weight.detach()
    made.weight = Params4bit(weight, requires_grad=False, module=made, **settings).to(device)
    made.weight.quant_state.dtype = plan.dtype  # of the products, whatever the file's is
    made.bias = linear.bias
    # with this flag one forward in eval mode repacks the weight in place for AVX512-BF16; gradients, state dict and
    # dequantized weight are wrong from then on, and nothing says so
    made.support_avx512bf16_for_cpu = False
    return made.train(linear.training)


def _int8(linear: nn.Linear, plan: QuantizationPlan, device: torch.device) -> nn.Module:
    from eulerforge.models.quantized_linear import Int8Linear

    return Int8Linear.of(linear, device=device, compute_dtype=plan.dtype)


def _quantize_experts(experts: StoredExperts, name: str, plan: QuantizationPlan, device: torch.device) -> None:
    """Quantize a fused parameter, one expert after the other: each as a linear layer of its own would be.

    Only the double quantization of 4-bit constants spans them all, as where bitsandbytes quantizes the whole tensor.
    """
    from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    weight_EOI = experts.get_parameter(name).detach()
    shape, precision = weight_EOI.shape, plan.precision
    if precision.mode == "int8":
        rows_EOI = torch.empty(shape, dtype=torch.int8, device=device)
        scale_EO = torch.empty(shape[:2], device=device)
        for expert, weight_OI in enumerate(weight_EOI):
            rows_EOI[expert], scale_EO[expert], _ = int8_vectorwise_quant(weight_OI.to(device, torch.float16))
        experts.register_parameter(name, nn.Parameter(rows_EOI, requires_grad=False))
        experts.register_buffer(name + SCALES, scale_EO)
        return
    packed_E = torch.empty(shape[0], shape[1] * shape[2] // 2, dtype=torch.uint8, device=device)
    absmax_E = torch.empty(shape[0], shape[1] * shape[2] // BLOCK, device=device)
    for expert, weight_OI in enumerate(weight_EOI):
        packed, one = quantize_4bit(weight_OI.to(device), blocksize=BLOCK, quant_type=precision.quant_type)
        packed_E[expert], absmax_E[expert] = packed.view(-1), one.absmax
    absmax, nested = absmax_E.view(-1), {}
    if precision.double_quant:
        offset = absmax.mean()
        absmax, second = quantize_blockwise(absmax - offset, blocksize=256)
        nested = {"offset": offset, "state2": second}
    state = QuantState(
        absmax=absmax, shape=shape, dtype=plan.dtype, blocksize=BLOCK, code=one.code, quant_type=precision.quant_type,
        **nested,
    )  # fmt: skip
    parameter = Params4bit(
        packed_E.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=precision.double_quant,
        quant_type=precision.quant_type,
        bnb_quantized=True,
    )
    experts.register_parameter(name, parameter)
