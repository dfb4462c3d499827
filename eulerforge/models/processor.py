"""In which precision a base is multiplied, and what this processor has for it; asked before torch is imported too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eulerforge.config.schema import LoadPrecision


def has_bf16_products() -> bool:
    """Whether the processor multiplies bf16 matrices; False where it does not say."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def product_key(precision: LoadPrecision) -> str:
    """The preset key that decides in which precision a base is multiplied; a quantized base has one of its own."""
    return f"model.load_precision.{'compute_dtype' if precision.mode in ('int8', 'int4') else 'mode'}"


def product_mode(precision: LoadPrecision) -> str:
    """What that key says: ``auto`` or a precision."""
    return precision.compute_dtype if precision.mode in ("int8", "int4") else precision.mode


def multiplies_fp32(precision: LoadPrecision) -> bool:
    """Whether a run on the CPU multiplies in fp32, by its settings."""
    wanted = product_mode(precision)
    return wanted == "fp32" or (wanted == "auto" and not has_bf16_products())
