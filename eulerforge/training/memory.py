"""How much memory a run used, will need, and what to do when it was too much."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from eulerforge.data.packing import token_budget
from eulerforge.errors import RunError, UsageError
from eulerforge.models.device import pick_device
from eulerforge.models.sizes import gib

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig
    from eulerforge.training.estimated import Estimated, NoEstimate

_MARKS = (
    "can't allocate memory", "out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: torch's own on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        # the system's other number is inherited from the process that started this one, if that was larger
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)


@attrs.define
class Shortage:
    """What is known of a run that may fail for memory; ``estimate`` is set once the run knows its model and rows."""

    config: RunConfig
    estimate: Callable[[], Estimated | NoEstimate] | None = None

    def hint(self) -> str:
        """The advice, behind the estimate's figures where they can be had."""
        try:
            made = self.estimate() if self.estimate is not None else None
            words, largest = made.shortage() if made is not None else ("", None)
            experts = made is not None and made.has_fused_experts()
            packing = made.packing if made is not None else None
        except Exception:  # noqa: BLE001 - what is reported is the error that came before
            words, largest, experts, packing = "", None, False, None
        return words + advice(self.config, largest, experts=experts, packing=packing)


@contextmanager
def out_of_memory_advice(config: RunConfig) -> Iterator[Shortage]:
    """Turn an out-of-memory error of the block into one that says what to change, with the run's own numbers.

    Raises:
        RunError: the block ran out of memory.
    """
    shortage = Shortage(config)
    try:
        yield shortage
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # lets go of what the failed step held, for the estimate that is made next
        traceback.clear_frames(error.__traceback__)
        raise RunError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'no memory left'}", hint=shortage.hint()
        ) from error


def advice(config: RunConfig, largest: int | None = None, *, experts: bool = False, packing: str | None = None) -> str:
    """What makes a run smaller, most effective first; ``largest`` tokens of a micro-batch are known to fit.

    Nothing is named that the run would be refused for: int4 reaches no ``experts`` that are fused into one tensor, and
    a quantized base does not train. ``packing`` is the layout that the run has, whatever it was asked for.
    """
    training, longest, parts = config.training, config.data.max_length, []
    trains_base = any({"base_ffn", "router"} & set(phase.trainable) for phase in training.phases)
    if config.model.load_precision.mode not in ("int4", "int8") and not (experts or trains_base):
        parts.append(f"model.load_precision.mode=int4 (now {config.model.load_precision.mode})")
    if (packing or config.data.packing) == "flat":  # tokens bound a micro-batch here, whatever batch_size is
        now = token_budget(config, pick_device(config.device))
        fewer = largest if largest and largest < now else max(longest, now // 2)
        if fewer < now:
            parts.append(f"training.tokens_per_micro_batch={fewer} (now {now}; the result stays the same)")
    elif training.batch_size > 1:
        rows = training.batch_size * training.grad_accum_steps
        most = training.batch_size // 2 if not largest else max(1, min(training.batch_size - 1, largest // longest))
        smaller = max(size for size in range(1, most + 1) if rows % size == 0)
        accum = rows // smaller
        parts.append(
            f"training.batch_size={smaller} with training.grad_accum_steps={accum} (now {training.batch_size} and "
            f"{training.grad_accum_steps}; the result stays the same)"
        )
    if training.gradient_checkpointing != "all":
        parts.append("training.gradient_checkpointing=all")
    parts.append(f"a smaller data.max_length (now {longest})")
    rank = getattr(config.injection, "lora_r", None)
    if rank is not None and rank > 1:
        parts.append(f"a smaller injection.lora_r (now {rank})")
    return "try, in this order, --set " + ", ".join(parts)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(mark in str(error) for mark in _MARKS)


def memory_bytes(device: torch.device) -> int:
    """What the device has in all, used or free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_beyond_memory(parameters: int, device: torch.device) -> None:
    """Refuse adapters that no device of this size can hold, before one of them is made.

    Raises:
        UsageError: ``parameters`` numbers in fp32 take more than there is; a system that lends memory which it has not
            would end the process without a word.
    """
    needed, there = parameters * 4, memory_bytes(device)
    if needed > there:
        raise UsageError(
            f"the adapters' {parameters:,} parameters take {gib(needed)}, and {device} has {gib(there)}",
            key="injection",
            hint="a smaller rank: --set injection.lora_r=16",
        )


class KeptForBackward:
    """Counts the bytes that autograd keeps from the forward to the backward pass, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self._skip = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        self._seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._skip:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor
