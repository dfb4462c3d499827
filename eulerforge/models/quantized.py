"""Quantized bases: what of a model is quantized, said before loading, and weights of quantized layers read again.

Embeddings, the output head, norms, routers and a vision tower keep the compute dtype: nothing is cast up.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from eulerforge.config.schema import LoadPrecision
from eulerforge.errors import ModelError, first_line
from eulerforge.models.device import DTYPE_NAMES
from eulerforge.models.experts import DOWN, StoredExperts, is_known
from eulerforge.models.sizes import gib

BLOCK = 64  # weights that share one scale in 4 bits; a row holds whole blocks
OUT_MULTIPLE = 32  # what bitsandbytes' kernels ask of out_features
KEY = "model.load_precision"


@attrs.frozen(kw_only=True, slots=False)
class QuantizationPlan:
    """What becomes of a model's parameters: paths of the layers to quantize, and all that stays in ``dtype``.

    ``fused`` are the paths of the fused expert tensors to quantize. ``unfit`` holds the layers whose shape does not
    fit, as last path component and (out, in), with their number, and ``experts`` the paths of fused expert tensors
    whose shape or layout does not. Bytes are those of the compute dtype, ``quantized_bytes`` after quantization.
    ``shares`` is whether one of them is found under several names, as where code of a model uses a layer twice.
    """

    precision: LoadPrecision
    dtype: torch.dtype
    layers: tuple[str, ...]
    fused: tuple[str, ...]
    unfit: dict[tuple[str, int, int], int]
    experts: tuple[str, ...]
    layer_bytes: int
    quantized_bytes: int
    expert_bytes: int
    other_bytes: int
    shares: bool = False

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names of all parameters to quantize."""
        return frozenset((*(f"{path}.weight" for path in self.layers), *self.fused))

    def lines(self, stored: torch.dtype | None = None) -> list[str]:
        """What is announced before a byte of the weights is read; experts that are left stay in ``stored``, if any."""
        kept = DTYPE_NAMES[self.dtype]
        fused = f" and {len(self.fused)} fused expert tensors" if self.fused else ""
        lines = [
            f"{describe(self.precision)}: {len(self.layers)} linear layers{fused}, {gib(self.layer_bytes)} in {kept}"
            f" become {gib(self.quantized_bytes)}; {gib(self.other_bytes)} (embeddings, output head, norms) stay {kept}"
        ]
        if self.unfit:
            names = ", ".join(f"{name} ({count} of {out} x {into})" for (name, out, into), count in self.unfit.items())
            lines.append(
                f"not quantized, because out_features is no multiple of {OUT_MULTIPLE} or in_features none of {BLOCK}:"
                f" {names}"
            )
        if self.experts:
            lines.append(f"not quantized: {self._experts_line(stored or self.dtype)}")
        return lines

    def refuse(self, name: str) -> None:
        """Refuse a model that the mode cannot make smaller as its user expects.

        Raises:
            ModelError: fused experts would stay as they are and nobody allowed it, or nothing can be quantized.
        """
        mode = self.precision.mode
        if self.experts and not self.precision.allow_unquantized_experts:
            raise ModelError(
                f"{mode} does not reach the experts of {name}: {self._experts_line(self.dtype)}",
                key=f"{KEY}.mode",
                hint=f"--set {KEY}.allow_unquantized_experts=true loads them so all the same; the whole model then"
                f" takes {gib(self.expert_bytes + self.quantized_bytes + self.other_bytes)}",
            )
        if not self.layers and not self.fused:
            raise ModelError(
                f"{name} has no linear layer that {mode} fits",
                key=f"{KEY}.mode",
                hint=f"out_features must be a multiple of {OUT_MULTIPLE}, in_features of {BLOCK}; use mode = bf16",
            )

    def _experts_line(self, dtype: torch.dtype) -> str:
        size = self.expert_bytes // self.dtype.itemsize * dtype.itemsize
        return (
            f"{len(self.experts)} fused expert tensors, {self.experts[0]} first, stay {DTYPE_NAMES[dtype]} and"
            f" take {gib(size)}, because of their layout, or in_features that are no multiple of {BLOCK}"
        )


def quantizes_experts(module: nn.Module) -> bool:
    """Whether a quantized base stores weights of this module in another form, or will."""
    fits = (weight.shape[-1] % BLOCK == 0 for weight in module.parameters(recurse=False))
    return isinstance(module, StoredExperts) or (is_known(module) and module.get_parameter(DOWN).is_meta and any(fits))


def plan_from_config(
    folder: Path, precision: LoadPrecision, dtype: torch.dtype, *, remote_code: bool
) -> QuantizationPlan:
    """The plan of a model folder, from its config.json alone: the model is built on the meta device.

    Raises:
        ModelError: transformers knows no model for the config, or it has no decoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        first = first_line(error)
        raise ModelError(
            f"{folder.name} cannot be loaded: {first}", key="model_name", hint="--debug shows the whole error"
        ) from error
    if any(getattr(part, "quantization_config", None) is not None for part in (config, config.get_text_config())):
        raise ModelError(
            f"{folder.name} is stored quantized already",
            key=f"{KEY}.mode",
            hint="give the model in bf16, fp16 or fp32, which is quantized while it loads",
        )
    return plan_of(model, precision, dtype)


def plan_of(model: Any, precision: LoadPrecision, dtype: torch.dtype) -> QuantizationPlan:
    """The plan of a model, on whatever device it is.

    Raises:
        ModelError: the model has no decoder with layers.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder_layers = getattr(get_decoder(), "layers", None) if callable(get_decoder) else None
    prefix = next((name for name, module in model.named_modules() if module is decoder_layers), None)
    if decoder_layers is None or prefix is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder layers, so nothing of it can be quantized",
            key=f"{KEY}.mode",
            hint="load it in bf16, fp16 or fp32",
        )
    layers, fused, experts, numbers, scales = [], [], [], 0, 0.0
    unfit: Counter[tuple[str, int, int]] = Counter()
    wrappers = [path for path, module in decoder_layers.named_modules(prefix=prefix) if hasattr(module, "base_layer")]
    for path, module in decoder_layers.named_modules(prefix=prefix):
        if any(f"{path}.".startswith(f"{at}.") and not path.startswith(f"{at}.base_layer") for at in wrappers):
            continue  # an adapter's own
        if type(module) is nn.Linear:
            out, into = module.out_features, module.in_features
            if out % OUT_MULTIPLE or into % BLOCK:
                unfit[path.rpartition(".")[2], out, into] += 1
                continue
            layers.append(path)
            numbers += out * into
            scales += _scale_bytes(out, into, precision)
        elif not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            # the weights of all experts of a layer are one tensor (experts, out, in)
            known = is_known(module)
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim != 3:
                    continue
                count, out, into = weight.shape
                if not known or into % BLOCK:
                    experts.append(f"{path}.{name}")
                    continue
                fused.append(f"{path}.{name}")
                numbers += weight.numel()
                scales += _scale_bytes(count * out, into, precision)
    parameters = dict(model.named_parameters())
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    size = dtype.itemsize
    expert_numbers = sum(parameters[path].numel() for path in experts)
    return QuantizationPlan(
        precision=precision,
        dtype=dtype,
        layers=tuple(layers),
        fused=tuple(fused),
        shares=any(names[id(parameters[name])] > 1 for name in (*(f"{path}.weight" for path in layers), *fused)),
        unfit=dict(unfit),
        experts=tuple(experts),
        layer_bytes=numbers * size,
        quantized_bytes=int(numbers * (0.5 if precision.mode == "int4" else 1) + scales),
        expert_bytes=expert_numbers * size,
        other_bytes=(sum(p.numel() for p in parameters.values()) - numbers - expert_numbers) * size,
    )


def _scale_bytes(out: int, into: int, precision: LoadPrecision) -> float:
    if precision.mode == "int8":
        return 4 * out
    blocks = out * into / BLOCK
    return blocks * (1 + 4 / 256) if precision.double_quant else 4 * blocks


def describe(precision: LoadPrecision) -> str:
    """The mode with all that decides its numbers: ``int4 (nf4, double quantization)``."""
    if precision.mode == "int8":
        return "int8"
    return f"int4 ({precision.quant_type}{', double quantization' if precision.double_quant else ''})"


class Int4Ops:
    """bitsandbytes' ``Linear4bit``."""

    def dequantize(self, module: Any) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
        return weight.float()

    def plain(self, module: Any, weight: torch.Tensor) -> nn.Module:
        return _plain(module, weight, module.compute_dtype or module.weight.quant_state.dtype)


class Int8Ops:
    """bitsandbytes' ``Linear8bitLt``."""

    def dequantize(self, module: Any) -> torch.Tensor:
        from eulerforge.models.quantized_linear import dequantized

        return dequantized(module)

    def plain(self, module: Any, weight: torch.Tensor) -> nn.Module:
        return _plain(module, weight, getattr(module, "compute_dtype", torch.float32))


def _plain(module: Any, weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    """A plain layer with this weight, cast once: quantizing it again would lose about 40% of a typical delta."""
    with torch.device("meta"):
        made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return made.train(module.training)


def quantized_ops(module: nn.Module) -> Int4Ops | Int8Ops | None:
    """The operations of a bitsandbytes layer; None for any other module. Imports nothing."""
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if layers is None:
        return None
    if isinstance(module, layers.Linear4bit):
        return Int4Ops()
    # with has_fp16_weights the weight is a plain one that is quantized on the fly
    return Int8Ops() if isinstance(module, layers.Linear8bitLt) and module.weight.dtype == torch.int8 else None


def parameter_count(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for: a 4-bit one packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
