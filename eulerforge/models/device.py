"""Which device and which precision a run uses."""

from __future__ import annotations

from pathlib import Path

import torch

from eulerforge.config.schema import LoadPrecision
from eulerforge.errors import DeviceError, UsageError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none.

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
        raise DeviceError(f"{name} is asked for, but {found}", key="device", hint="--set device=cpu")
    return torch.device("cuda", device.index or 0)


def pick_dtype(mode: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; ``auto`` is bf16 where the device multiplies it in hardware, else fp32."""
    if mode in DTYPES:
        return DTYPES[mode]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bf16_products() else torch.float32


def base_dtype(precision: LoadPrecision, device: torch.device) -> torch.dtype:
    """The dtype of a base's activations; that of its weights too, but for those that int4 and int8 quantize."""
    return pick_dtype(precision.compute_dtype if precision.mode in ("int8", "int4") else precision.mode, device)


def _cpu_has_bf16_products() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
