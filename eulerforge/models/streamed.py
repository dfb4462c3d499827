"""Quantizing while a checkpoint is read: one tensor after the other, so the unquantized model is never in memory whole.

transformers asks a quantizer what becomes of each tensor once it has renamed those of the files and fused them; ours
puts the quantized module in the place of the plain one. It is registered under a name of its own and leaves no trace
on the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import attrs
import torch

from eulerforge.models.experts import stored_shape
from eulerforge.models.quantize import quantize_parameter
from eulerforge.models.quantized import QuantizationPlan
from eulerforge.models.room import trim_heap
from eulerforge.models.soundness import is_finite

METHOD = "eulerforge"
EVERY = 10.0
"""Seconds between lines that say how far it is."""
_LOCK = threading.Lock()
TRIM = 128 << 20
"""Bytes that are read before the C library gives back what it kept: quantizing makes and frees several times the
weight, between blocks that stay, and took 713 MiB of heap for a model of 160."""


class Halted(BaseException):
    """Quantizing a tensor raised ``error``: most likely memory ran out, and what follows may not be read.

    transformers notes an exception, reads on, and makes random numbers in full precision of all that is missing.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@attrs.define(kw_only=True)
class Streaming:
    """What is to be quantized as it is read, where to, and what was found.

    ``not_finite`` are parameters with NaN or infinity, or which int8 cannot hold: it passes through fp16.
    """

    plan: QuantizationPlan
    device: torch.device
    say: Callable[[str], None] | None = None
    not_finite: list[str] = attrs.field(factory=list)
    _shapes: dict[str, tuple[int, ...]] = attrs.field(factory=dict)
    _misfits: set[str] = attrs.field(factory=set)
    _done: int = 0
    _untrimmed: int = 0
    _told: float = attrs.field(factory=time.monotonic)

    def wants(self, name: str) -> bool:
        """Whether a parameter becomes a quantized one; one of another shape is left as it is, to be refused."""
        return name in self.plan.parameters and name not in self._misfits

    def expect(self, model: Any) -> None:
        """Note the shapes of the model that is to be read, on the meta device."""
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def misfits(self, model: Any) -> set[str]:
        """Parameters that were read in another shape; not every version of transformers looks, beside a quantizer."""
        own = dict(model.named_parameters())
        return {name for name, shape in self._shapes.items() if name in own and stored_shape(own[name]) != shape}

    def take(self, model: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor that was read."""
        if not self.wants(name):
            return weight
        if weight.shape != self._shapes[name]:
            self._misfits.add(name)
            return weight
        try:
            if not is_finite(weight) or (self.plan.precision.mode == "int8" and _overflows(weight)):
                self.not_finite.append(name)
            made = quantize_parameter(model, name, weight, self.plan, self.device)
        except Exception as error:
            raise Halted(error) from error
        self._done += 1
        self._untrimmed += weight.nbytes
        if self._untrimmed > TRIM:
            trim_heap()
            self._untrimmed = 0
        if self.say is not None and time.monotonic() - self._told > EVERY:
            self._told = time.monotonic()
            self.say(f"quantized {self._done} of {len(self.plan.parameters)} weights")
        return made

    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes for it."""
        return {"quantization_config": _classes()(self)}


def forget(model: Any) -> None:
    """Take away what transformers wrote on a model that was read so: it would be saved with the config."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        if hasattr(module, "config"):
            for name in ("quantization_config", "_is_quantized"):
                module.config.__dict__.pop(name, None)


def _overflows(weight: torch.Tensor) -> bool:
    least, most = torch.aminmax(weight)
    return max(-float(least), float(most)) > torch.finfo(torch.float16).max


def _classes() -> Callable[[Streaming], Any]:
    """Our config, with its quantizer registered; another of that name, of a module that was loaded anew, gives way."""
    with _LOCK:
        return _registered()


@cache
def _registered() -> Callable[[Streaming], Any]:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Quantize(ConversionOps):  # type: ignore[misc]
        def __init__(self, streaming: Streaming) -> None:
            self.streaming = streaming

        def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Any]:
            tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
            return {name: self.streaming.take(model, name, tensor) for name, tensor in tensors.items()}

    class Quantizer(HfQuantizer):  # type: ignore[misc]
        is_trainable = True

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return self.quantization_config.streaming.wants(param_name)  # type: ignore[no-any-return]

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            self.quantization_config.streaming.expect(model)
            return model

        def get_quantize_ops(self) -> Any:
            return Quantize(self.quantization_config.streaming)

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, streaming: Streaming) -> None:
            self.quant_method, self.streaming = METHOD, streaming

        def __deepcopy__(self, memo: Any) -> Any:
            return self  # what is found while it reads must be found again

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Quantizer, Config
    return Config
