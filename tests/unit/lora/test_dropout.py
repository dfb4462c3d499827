"""The mask: a function of its number alone, right on average, and exact where it is applied."""

from __future__ import annotations

import pytest
import torch

from eulerforge.lora.dropout import draw_seed, fold, keep_mask, keep_share, masked, unfold

CPU = torch.device("cpu")


def test_the_same_number_gives_the_same_mask_whatever_torch_drew_before() -> None:
    first = keep_mask(torch.Size([33, 7]), 0.3, 5, CPU)
    torch.rand(100)
    assert torch.equal(first, keep_mask(torch.Size([33, 7]), 0.3, 5, CPU))
    assert not torch.equal(first, keep_mask(torch.Size([33, 7]), 0.3, 6, CPU))
    assert first.dtype == torch.bool


def test_the_mask_of_one_number_never_changes_between_versions() -> None:
    """Resume is bit-exact only if these bits stay; they are SFC64's of NumPy, which keeps its streams."""
    mask = keep_mask(torch.Size([4, 8]), 0.5, 12345, CPU)
    assert "".join("1" if kept else "0" for kept in mask.flatten().tolist()) == "11111100011111101101101101100001"


def test_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(3)
    first = [draw_seed(), draw_seed()]
    torch.manual_seed(3)
    assert [draw_seed(), draw_seed()] == first
    assert first[0] != first[1]
    assert all(0 <= seed < 2**63 for seed in first)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_the_probability_in_every_column_and_row(probability: float) -> None:
    kept = keep_mask(torch.Size([2000, 2000]), probability, 9, CPU).double()
    assert abs(float(kept.mean()) - keep_share(probability)) < 5 * (0.25 / 4e6) ** 0.5
    assert abs(keep_share(probability) - (1 - probability)) <= 0.5 / 2**24
    # five standard deviations of 2000 draws, over 2000 rows and columns; a row's own share is off by at most 1/256
    limit = 5.5 * (probability * (1 - probability) / 2000) ** 0.5 + 3 / 2000
    for dim, off in ((0, 0.0), (1, 1 / 256)):
        assert float((kept.mean(dim) - keep_share(probability)).abs().max()) < limit + off
    neighbours = ((kept[:, 1:] - kept.mean()) * (kept[:, :-1] - kept.mean())).mean()
    assert abs(float(neighbours)) < 5 * probability * (1 - probability) / 2000 + 1 / 256**2


def test_nothing_is_dropped_at_zero_and_one_in_256_stays_near_one() -> None:
    assert keep_mask(torch.Size([50, 50]), 0.0, 1, CPU).all()
    assert keep_share(0.9999) == 1 / 256
    kept = keep_mask(torch.Size([1000, 1000]), 0.9999, 1, CPU).double().mean()
    assert abs(float(kept) - 1 / 256) < 5 * (1 / 256 / 1e6) ** 0.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 24)])
def test_a_mask_comes_back_from_its_bits(shape: tuple[int, int]) -> None:
    mask = keep_mask(torch.Size(shape), 0.4, 2, CPU)
    bits = fold(mask)
    assert bits is not None
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unfold(bits, mask.shape), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masking_keeps_the_bits_of_what_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(40, 24).to(dtype)[:, 3:11]  # a view with strides of its own
    mask = keep_mask(x.shape, 0.4, 2, CPU)
    wanted = torch.where(mask, x, torch.zeros((), dtype=dtype))
    assert torch.equal(masked(x, mask, torch.empty_like(x)), wanted)
    assert torch.equal(masked(x, mask, x), wanted)
