"""Matrix products over groups of rows, one group for each expert: torch's grouped product, and a loop.

Rows are sorted by expert; ``ends_E`` (int32) holds where each expert's rows end.
Suffixes of tensor names: _S sorted rows, _E experts, _K what is summed over, _M and _N what is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from eulerforge.models.device import is_ampere_or_later

ALIGNMENT = 16
"""Bytes to which torch wants every row aligned: a rank in bf16 should be a multiple of 8, else the loop is taken."""
THIN = 16
"""Columns of b below which a CPU computes a^T b up to ten times as slowly as b^T a (fp32, 1,632 rows, 8 columns)."""


def group_ends(experts_S: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Where each expert's rows end, for the sorted expert of every row: int32, shape (num_experts,)."""
    return torch.searchsorted(
        experts_S, torch.arange(num_experts, device=experts_S.device, dtype=experts_S.dtype), right=True
    ).to(torch.int32)


def grouped_product(a_SK: torch.Tensor, b_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Each group's rows times its expert's matrix: shape (S, N)."""
    if native(a_SK, b_EKN):
        return F.grouped_mm(a_SK, b_EKN, offs=ends_E)
    return grouped_product_loop(a_SK, b_EKN, ends_E)


def grouped_outer(a_SM: torch.Tensor, b_SN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The sum over each group's rows of a^T b, shape (E, M, N): the gradient of a grouped product's matrices."""
    if a_SM.device.type == "cpu" and b_SN.shape[1] < min(THIN, a_SM.shape[1]):
        return grouped_outer(b_SN, a_SM, ends_E).transpose(1, 2).contiguous()
    if native(a_SM, b_SN):
        out_EMN = F.grouped_mm(a_SM.t(), b_SN, offs=ends_E)
        # an expert without rows: the kernel may leave its matrix as it found it
        empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return out_EMN.masked_fill_(empty_E[:, None, None], 0)
    return grouped_outer_loop(a_SM, b_SN, ends_E)


def native(*operands: torch.Tensor) -> bool:
    """Whether torch's own grouped product takes these operands."""
    device, dtype = operands[0].device, operands[0].dtype
    if not hasattr(F, "grouped_mm") or any(operand.numel() == 0 for operand in operands):
        return False
    if device.type == "cuda":
        known = dtype is torch.bfloat16 and is_ampere_or_later(device)
    else:
        known = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    strides = [stride for operand in operands for stride in operand.stride() if stride != 1]
    return (
        known
        # a dimension of size 1 has that stride too, which the kernel does not take for a row's
        and all(operand.stride().count(1) == 1 for operand in operands)
        and all(stride * dtype.itemsize % ALIGNMENT == 0 for stride in strides)
        and all(operand.data_ptr() % ALIGNMENT == 0 for operand in operands)
    )


def grouped_product_loop(a_SK: torch.Tensor, b_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``grouped_product`` one expert at a time: the fallback, and the reference of the tests."""
    return grouped_loop(a_SK, b_EKN.shape[2], ends_E, b_EKN.__getitem__)


def grouped_loop(
    a_SK: torch.Tensor, columns: int, ends_E: torch.Tensor, matrix: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """Each group's rows times ``matrix`` (K, N) of its expert, which is asked for when it is multiplied."""
    out_SN = a_SK.new_zeros(a_SK.shape[0], columns)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(a_SK[start:end], matrix(expert), out=out_SN[start:end])
        start = end
    return out_SN


def grouped_outer_loop(a_SM: torch.Tensor, b_SN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``grouped_outer`` one expert at a time."""
    out_EMN = a_SM.new_zeros(ends_E.shape[0], a_SM.shape[1], b_SN.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(a_SM[start:end].t(), b_SN[start:end], out=out_EMN[expert])
        start = end
    return out_EMN
