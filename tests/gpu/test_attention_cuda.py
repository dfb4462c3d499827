"""The kernels for packed rows on CUDA, against one document at a time in float64 on the CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eulerforge.data.packing import Segments
from eulerforge.training import attention, flex
from eulerforge.training.document_products import document_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (5, 1, 130, 64, 300)


def loop(query: Any, key: Any, value: Any, window: int | None) -> torch.Tensor:
    out = []
    for q, k, v in zip(*(part.split(LENGTHS) for part in (query, key, value)), strict=True):
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
        seen = (distance >= 0) & (distance < (window or len(q)))
        heads = [part.transpose(0, 1)[None] for part in (q, k, v)]
        done = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
        out.append(done[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("kernel", ["varlen", "flash-attn", "padded", "matmul"])
def test_kernel(kernel: str, window: int | None, width: int) -> None:
    if kernel == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    torch.manual_seed(0)
    cpu = [torch.randn(sum(LENGTHS), heads, width, dtype=torch.float64) for heads in (8, 2, 2)]
    cpu = [tensor.bfloat16().double().requires_grad_() for tensor in cpu]
    wanted = loop(*cpu, window)
    upstream = torch.randn(wanted.shape, dtype=torch.float64).bfloat16()
    gradients = torch.autograd.grad(wanted, cpu, upstream.double())
    gpu = [tensor.detach().bfloat16().cuda().requires_grad_() for tensor in cpu]
    segments = Segments(lengths=LENGTHS, shape=(1, sum(LENGTHS)), device=torch.device("cuda"))
    out = attention._KERNELS[kernel](*gpu, attention._Call(segments, width**-0.5, window, None, 0.0))
    found = (out, *torch.autograd.grad(out, gpu, upstream.cuda()))
    for ours, true in zip(found, (wanted, *gradients), strict=True):
        assert float(((ours.double().cpu() - true).norm() / true.norm()).detach()) < 2e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (32, None), (None, 2.0), (32, 2.0)])
@pytest.mark.parametrize("width", [64, 80])
def test_flex(width: int, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    assert flex.refusal(torch.device("cuda"), dtype, (6, 2, width), softcap is not None) == ""
    torch.manual_seed(0)
    for lengths in (LENGTHS, (700, 300, 24), (40, 3)):
        cpu = [torch.randn(sum(lengths), heads, width).to(dtype).double().requires_grad_() for heads in (6, 2, 2)]
        q_NQD, k_NKD, v_NKD = cpu
        wanted = document_products(q_NQD, k_NKD, v_NKD, lengths, width**-0.5, window, softcap)
        upstream = torch.randn(wanted.shape).to(dtype)
        gradients = torch.autograd.grad(wanted, cpu, upstream.double())
        gpu = [tensor.detach().to(dtype).cuda().requires_grad_() for tensor in cpu]
        segments = Segments(lengths=lengths, shape=(1, sum(lengths)), device=torch.device("cuda"))
        out = attention._KERNELS["flex"](*gpu, attention._Call(segments, width**-0.5, window, softcap, 0.0))
        found = (out, *torch.autograd.grad(out, gpu, upstream.cuda()))
        for ours, true in zip(found, (wanted, *gradients), strict=True):
            error = float(((ours.double().cpu() - true).norm() / true.norm()).detach())
            assert error < (1e-4 if dtype == torch.float32 else 2e-2)
