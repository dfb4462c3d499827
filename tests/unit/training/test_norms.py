"""Norms in one pass: what every family's own norm computes, and nothing that only looks like one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from eulerforge.training.norms import quicken_norms


class MeanRMSNorm(nn.Module):
    """Takes the mean away first: no RMS norm, whatever its name says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x - x.mean(-1, keepdim=True), x.shape[-1:], self.weight, self.eps)


class LlamaLikeRMSNorm(MeanRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GemmaLikeRMSNorm(MeanRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


def reference(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (weight + offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "offset"), [(LlamaLikeRMSNorm, 0.0), (GemmaLikeRMSNorm, 1.0)])
def test_value_and_gradient_are_the_float64_references(kind: Any, offset: float, dtype: torch.dtype) -> None:
    module = kind(48)
    module.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    module = module.to(dtype).requires_grad_(False)
    assert quicken_norms(module).count == 1
    generator = torch.Generator().manual_seed(2)
    x, upstream = (torch.randn(2, 7, 48, generator=generator).to(dtype) for _ in range(2))
    x = x.transpose(0, 1).requires_grad_()  # no contiguous rows
    exact = x.detach().double().requires_grad_()
    got, wanted = module(x), reference(exact, module.weight.double(), offset)
    (slope,) = torch.autograd.grad(got, x, upstream.transpose(0, 1))
    (true,) = torch.autograd.grad(wanted, exact, upstream.transpose(0, 1).double())
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope.double(), true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaLikeRMSNorm, GemmaLikeRMSNorm])
def test_the_bits_are_the_modules_own(kind: Any, dtype: torch.dtype) -> None:
    module = kind(64).requires_grad_(False)
    module.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    module = module.to(dtype)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    own = module(x)
    assert quicken_norms(module).count == 1
    assert torch.equal(module(x), own)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral", "qwen3_5"])
def test_a_family_computes_what_it_did(family: str) -> None:
    plain = tiny_model(family).requires_grad_(False)
    quick = copy.deepcopy(plain)
    norms = quicken_norms(quick)
    assert norms.count >= 2 * len(plain.get_decoder().layers) + 1
    assert norms.left == (("2 Qwen3_5RMSNormGated",) if family == "qwen3_5" else ())
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    slopes = []
    for model in (plain, quick):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        slopes.append(embedded.grad)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-7)
    assert torch.equal(quick(ids).logits, plain(ids).logits)
    norms.remove()
    assert torch.equal(quick(ids).logits, plain(ids).logits)
    assert not any("forward" in vars(module) for module in quick.modules())


def test_what_only_looks_like_one_is_left_and_named() -> None:
    model = nn.Sequential(MeanRMSNorm(16), MeanRMSNorm(16), LlamaLikeRMSNorm(16))
    norms = quicken_norms(model)
    assert norms.line() == "norms: 1 computed in one pass; left as they are: 2 MeanRMSNorm"


def test_a_norm_that_trains_keeps_its_own_forward() -> None:
    module = LlamaLikeRMSNorm(16)
    quicken_norms(module)
    module(torch.randn(3, 16)).sum().backward()
    assert module.weight.grad is not None


def test_a_result_can_be_changed_in_place_and_derived() -> None:
    module = LlamaLikeRMSNorm(16).requires_grad_(False)
    x = torch.randn(2, 5, 16, requires_grad=True)
    (wanted,) = torch.autograd.grad((module(x) * 3).sum(), x)
    quicken_norms(module)
    y = module(x)
    y *= 3
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, wanted)


def test_a_router_with_jitter_trains() -> None:
    model = tiny_model("mixtral").requires_grad_(False).train()
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.1
    quicken_norms(model)
    embedded = torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embedded, labels=torch.arange(5)[None]).loss.backward()
    assert embedded.grad is not None


def test_a_copy_computes_with_its_own_weight() -> None:
    module = LlamaLikeRMSNorm(16).requires_grad_(False)
    quicken_norms(module)
    twin, x = copy.deepcopy(module), torch.randn(3, 16)
    twin.weight.fill_(5.0)
    torch.testing.assert_close(twin(x), 5 * module(x))
