"""A precision that the processor cannot multiply is said before a run is wasted on it."""

from __future__ import annotations

import pytest
import torch

from eulerforge.config.schema import LoadPrecision
from eulerforge.models import device as room
from eulerforge.models import processor
from eulerforge.models.device import base_dtype, slow_products

CPU = torch.device("cpu")


def seconds_of(halves: float, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """fp32 takes 1 s, anything else ``halves``; gives back a list of what was timed."""
    timed: list[torch.dtype] = []

    def product_seconds(dtype: torch.dtype) -> float:
        timed.append(dtype)
        return 1.0 if dtype == torch.float32 else halves

    monkeypatch.setattr(room, "_product_seconds", product_seconds)
    return timed


@pytest.mark.parametrize(
    ("precision", "key"),
    [
        (LoadPrecision(mode="bf16", compute_dtype="bf16"), "compute_dtype"),
        (LoadPrecision(compute_dtype="fp16"), "compute_dtype"),
        (LoadPrecision(mode="int4", compute_dtype="bf16"), "compute_dtype"),
    ],
)
def test_slow_products_are_said_with_the_setting_that_is_faster(
    precision: LoadPrecision, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds_of(8.0, monkeypatch)
    said = slow_products(precision, CPU)
    assert said is not None
    assert "8 times slower than fp32" in said
    assert f"--set model.load_precision.{key}=fp32" in said


def test_fast_products_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_of(0.3, monkeypatch)
    assert slow_products(LoadPrecision(mode="bf16", compute_dtype="bf16"), CPU) is None


@pytest.mark.parametrize("mode", ["auto", "fp32", "int8"])
def test_nothing_is_timed_where_the_user_names_no_half(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = seconds_of(8.0, monkeypatch)
    assert slow_products(LoadPrecision(mode=mode), CPU) is None
    assert slow_products(LoadPrecision(mode="bf16"), torch.device("cuda")) is None
    assert not timed


@pytest.mark.parametrize(
    ("mode", "compute", "words", "dtype"),
    [
        ("auto", "auto", "avx512_bf16", torch.bfloat16),
        ("auto", "auto", "avx2", torch.float32),
        ("auto", "fp32", "avx512_bf16", torch.float32),
        ("bf16", "auto", "amx_bf16", torch.bfloat16),
        ("bf16", "auto", "avx2", torch.float32),  # stored as bf16, multiplied at speed
        ("bf16", "bf16", "avx2", torch.bfloat16),  # as it was asked for, however slow
        ("fp16", "auto", "avx512_bf16", torch.float32),
        ("fp16", "auto", "avx512_fp16", torch.float16),
        ("int4", "auto", "avx2", torch.float32),
        ("int4", "bf16", "avx2", torch.bfloat16),
    ],
)
def test_a_half_is_multiplied_where_the_processor_can_or_the_preset_says_so(
    mode: str, compute: str, words: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_products", lambda half: words in processor.HALVES[half])
    assert base_dtype(LoadPrecision(mode=mode, compute_dtype=compute), CPU) == dtype


def test_the_products_are_really_timed() -> None:
    halves, fp32 = (room._product_seconds(dtype) for dtype in (torch.bfloat16, torch.float32))
    assert 0 < fp32 < 0.1
    assert 0 < halves < 2


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_the_card_that_is_asked_for_decides_about_bf16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the current one: torch's own question takes no device."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert base_dtype(LoadPrecision(), torch.device("cuda", 1)) == dtype
    assert asked == [torch.device("cuda", 1)]
