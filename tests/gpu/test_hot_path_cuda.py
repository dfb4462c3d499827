"""The hot path on CUDA: the same numbers as on the CPU in float64, and how many kernels a LoRA layer launches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eulerforge.lora.linear import LoRALinear
from eulerforge.training.loss import summed_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_loss_equals_float64_on_the_cpu() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(300, 64), torch.randint(1000, (300,))
    exact = hidden.double().requires_grad_()
    want = nn.functional.cross_entropy(exact @ head.weight.double().T, labels, reduction="sum")
    want.backward()
    on_gpu = hidden.cuda().requires_grad_()
    got = summed_cross_entropy(head.cuda(), on_gpu, labels.cuda())
    got.backward()
    torch.testing.assert_close(got.cpu().double(), want.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(on_gpu.grad.cpu().double(), exact.grad, rtol=1e-3, atol=1e-4)


def test_a_layer_launches_few_kernels() -> None:
    """Without dropout. A first bound that no GPU has confirmed yet; PEFT's whole decoder layer launches about 208."""
    from torch.profiler import ProfilerActivity, profile

    base = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16, device="cuda")
    layer = LoRALinear(base, r=16, alpha=32)
    x = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        layer(x).backward(torch.ones(256, 512, dtype=torch.bfloat16, device="cuda"))
        torch.cuda.synchronize()
    launches = sum(event.count for event in seen.key_averages() if "LaunchKernel" in event.key)
    assert 0 < launches <= 24


def test_norms_in_one_kernel_are_the_models_own() -> None:
    from tiny import tiny_model

    from eulerforge.training.norms import quicken_norms

    model = tiny_model("qwen3").to("cuda", torch.bfloat16).requires_grad_(False)
    ids = torch.randint(3, 50, (2, 9), device="cuda")
    own = model(ids).logits
    norms = quicken_norms(model)
    assert norms.count == 2 * 3 + 1 + 2 * 3
    torch.testing.assert_close(model(ids).logits, own, rtol=2e-2, atol=2e-2)
