"""Which device and which precision a run uses."""

from __future__ import annotations

import time

import torch

from eulerforge.config.schema import LoadPrecision
from eulerforge.errors import DeviceError, UsageError
from eulerforge.models.processor import product_key, product_mode, product_of_cpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PROBED = 192
"""Rows and columns of the product that is timed: a fast one takes 0.2 ms, a slow one some 20."""
SLOW = 3
"""Times the seconds of fp32 from which on a warning is worth it."""


def pick_device(name: str, *, hint: str = "--set device=cpu") -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none; ``hint`` is what the command can be told.

    Raises:
        DeviceError: a CUDA device is named that is not there.
        UsageError: the name is no device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is no device", key="device", hint="use auto, cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"{name!r} is not supported", key="device", hint="use auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        found = f"this machine has {count} CUDA devices" if count else "this machine has no CUDA device"
        raise DeviceError(f"{name} is asked for, but {found}", key="device", hint=hint)
    return torch.device("cuda", device.index or 0)


def is_ampere_or_later(device: torch.device) -> bool:
    """Whether a card multiplies bf16 in hardware and runs the kernels that ask for such a one."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def base_dtype(precision: LoadPrecision, device: torch.device) -> torch.dtype:
    """The dtype of a base's activations; that of its weights too, but for what is quantized or stored as a half.

    ``auto`` is bf16 where the device multiplies it in hardware, else fp32.
    """
    if device.type != "cuda":
        return DTYPES[product_of_cpu(precision)]
    wanted = product_mode(precision)
    # torch's own question is about the current device, which may be another one
    return DTYPES.get(wanted) or (torch.bfloat16 if is_ampere_or_later(device) else torch.float32)


def slow_products(precision: LoadPrecision, device: torch.device) -> str | None:
    """A warning where a precision that the user names makes the CPU's matrix products many times slower than fp32.

    Measured, because torch multiplies halves one by one where the processor cannot: up to 90 times slower.
    """
    if device.type != "cpu" or product_mode(precision) == "auto":
        return None
    dtype = base_dtype(precision, device)
    if dtype == torch.float32:
        return None
    times = _product_seconds(dtype) / _product_seconds(torch.float32)
    if times < SLOW:
        return None
    return (
        f"this processor multiplies {DTYPE_NAMES[dtype]} matrices {times:.0f} times slower than fp32 ones, and the run"
        f" will be slow; --set {product_key(precision)}=fp32 is faster and needs more memory"
    )


def _product_seconds(dtype: torch.dtype) -> float:
    square, taken = torch.ones(PROBED, PROBED, dtype=dtype), []
    for _ in range(3):  # the first builds the kernel
        began = time.perf_counter()
        square @ square
        taken.append(time.perf_counter() - began)
    return min(taken)
