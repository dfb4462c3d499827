"""Grouped products against a loop over the groups, empty groups included."""

from __future__ import annotations

import pytest
import torch

from eulerforge.models.grouped import (
    group_ends,
    grouped_outer,
    grouped_outer_loop,
    grouped_product,
    grouped_product_loop,
    native,
)

# the first, a middle and the last expert get nothing
EXPERTS = torch.tensor([1, 1, 1, 2, 4, 4, 4, 4, 4, 5])
ENDS = [0, 3, 4, 4, 9, 10, 10]


def test_ends_are_counted_for_experts_without_rows_too() -> None:
    ends = group_ends(EXPERTS, 7)
    assert ends.dtype == torch.int32
    assert ends.tolist() == ENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_products_equal_one_matrix_product_per_group(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(10, 6, dtype=dtype), torch.randn(7, 5, 6, dtype=dtype), torch.randn(10, 3, dtype=dtype)
    ends = torch.tensor(ENDS, dtype=torch.int32)
    wanted = torch.stack([b[expert].double() @ row.double() for expert, row in zip(EXPERTS, a, strict=True)])
    outer = torch.zeros(7, 6, 3, dtype=torch.float64)
    for expert, row, other in zip(EXPERTS, a, c, strict=True):
        outer[expert] += torch.outer(row.double(), other.double())
    close = {"rtol": 1e-2, "atol": 3e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for product in (grouped_product, grouped_product_loop):
        torch.testing.assert_close(product(a, b.transpose(1, 2), ends).double(), wanted, **close)
    for product in (grouped_outer, grouped_outer_loop):
        found = product(a, c, ends)
        torch.testing.assert_close(found.double(), outer, **close)
        assert not found[[0, 3, 6]].any()
        assert found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_column_and_one_row_are_taken_too(dtype: torch.dtype) -> None:
    """torch's own product refuses a matrix that is one number wide: rank 1."""
    ends = torch.tensor([4, 8], dtype=torch.int32)
    wide, thin = torch.ones(8, 16, dtype=dtype), torch.ones(8, 1, dtype=dtype)
    assert grouped_product(wide, torch.ones(2, 16, 1, dtype=dtype), ends).flatten().tolist() == [16.0] * 8
    turned = torch.ones(2, 1, 16, dtype=dtype).transpose(1, 2)
    assert grouped_product(wide, turned, ends).flatten().tolist() == [16.0] * 8
    assert grouped_product(thin, torch.ones(2, 1, 16, dtype=dtype), ends).unique().tolist() == [1.0]
    assert grouped_outer(wide, thin, ends).flatten().tolist() == [4.0] * 32
    assert grouped_outer(thin, wide, ends).flatten().tolist() == [4.0] * 32


def test_torch_s_own_product_is_used_where_it_exists() -> None:
    assert native(torch.zeros(2, 8), torch.zeros(1, 8, 8))
    assert native(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 8, dtype=torch.bfloat16))
    assert not native(torch.zeros(2, 8, dtype=torch.float64), torch.zeros(1, 8, 8, dtype=torch.float64))
    assert not native(torch.zeros(0, 8), torch.zeros(1, 8, 8))
