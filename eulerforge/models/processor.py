"""In which precision a base is multiplied, and what this processor has for it; asked before torch is imported too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eulerforge.config.schema import LoadPrecision


QUANTIZED_MODES = ("int8", "int4")
HALVES = {"bf16": {"amx_bf16", "avx512_bf16", "bf16"}, "fp16": {"amx_fp16", "avx512_fp16"}}
"""Each half precision, with the words of x86 processors for an instruction that multiplies it, and ARM's for bf16."""


def has_products(half: str) -> bool:
    """Whether the processor multiplies matrices of a half precision; False where it does not say."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return not HALVES[half].isdisjoint(said.split())


def product_key(precision: LoadPrecision) -> str:
    """The preset key that decides in which precision a base is multiplied."""
    return f"model.load_precision.{'compute_dtype' if _is_named(precision) else 'mode'}"


def product_mode(precision: LoadPrecision) -> str:
    """What that key says: ``auto`` or a precision."""
    return precision.compute_dtype if _is_named(precision) else precision.mode


def _is_named(precision: LoadPrecision) -> bool:
    """Whether ``compute_dtype`` decides: of a quantized base always, else where it says anything."""
    return precision.mode in QUANTIZED_MODES or precision.compute_dtype != "auto"


def product_of_cpu(precision: LoadPrecision) -> str:
    """The precision in which the CPU multiplies a base: fp32, fp16 or bf16.

    A half precision that the processor cannot multiply is multiplied in fp32, which is exact and many times faster,
    unless ``compute_dtype`` names it.
    """
    wanted = product_mode(precision)
    if wanted == "auto":
        return "bf16" if has_products("bf16") else "fp32"
    return "fp32" if wanted in HALVES and not _is_named(precision) and not has_products(wanted) else wanted


def multiplies_fp32(precision: LoadPrecision) -> bool:
    """Whether a run on the CPU multiplies in fp32, by its settings."""
    return product_of_cpu(precision) == "fp32"
