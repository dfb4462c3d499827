"""The one-pass loss against ``F.cross_entropy`` over whole fp32 logits: value, gradients, edges, and its memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eulerforge.models import room as room_house
from eulerforge.training import loss as loss_room
from eulerforge.training.loss import is_plain, summed_cross_entropy

N, H, V = 37, 12, 50


def reference(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = head(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


def case(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    nn.init.normal_(head.weight, std=0.5)
    return head, torch.randn(N, H, dtype=dtype, requires_grad=True), torch.randint(V, (N,))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 10 rows in fp32, blocks of 3: neither divides N."""
    monkeypatch.setattr(loss_room, "CHUNK_BYTES", {"cpu": 10 * 4 * V, "cuda": 10 * 4 * V})
    monkeypatch.setattr(loss_room, "BLOCK_NUMBERS", {"cpu": 3 * V})


class Wrapped(nn.Module):
    """A head of a third party: another class around a linear module."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_value_and_every_gradient_equal_the_reference(
    softcap: float | None, bias: bool, trainable: bool, wrapped: bool
) -> None:
    head, hidden, labels = case(bias=bias)
    head.requires_grad_(trainable)
    got = summed_cross_entropy(Wrapped(head) if wrapped else head, hidden, labels, softcap)
    (got / 7).backward()
    head64, hidden64, _ = case(bias=bias)
    head64, hidden64 = head64.double(), hidden64.detach().double().requires_grad_()
    want = reference(head64, hidden64, labels, softcap)
    (want / 7).backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(head.parameters(), head64.parameters(), strict=True):
        assert (ours.grad is not None) == trainable
        if trainable:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_room_for_logits_serves_evaluation_and_training_of_any_size() -> None:
    head, hidden, labels = case()
    head.requires_grad_(False)
    room_house._KEPT.__dict__.clear()
    with torch.inference_mode():
        summed_cross_entropy(head, hidden.detach()[:3], labels[:3])
    for rows in (N, 5, N):
        hidden.grad = None
        got = summed_cross_entropy(head, hidden[:rows], labels[:rows])
        got.backward()
        given = hidden.detach().requires_grad_()
        reference(head, given[:rows], labels[:rows], None).backward()
        torch.testing.assert_close(hidden.grad, given.grad, rtol=1e-5, atol=1e-6)
    step = loss_room.CPU_STEP
    assert room_house._KEPT.rooms["logits", torch.float32].numel() == -(-N // step) * step * V


def test_a_label_that_the_model_calls_impossible_has_a_finite_loss() -> None:
    """Its probability, exp(-400), is 0 in fp32; the loss is 400 all the same, and its gradient -1."""
    head = nn.Linear(2, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[400.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    got = summed_cross_entropy(head, hidden, torch.tensor([1]))
    got.backward()
    assert got.item() == 400
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[400.0, 0.0]]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_float64(softcap: float | None) -> None:
    head, hidden, labels = case(torch.float64)

    def run(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return loss_room._LinearCrossEntropy.apply(hidden, weight, bias, labels, softcap)

    assert torch.autograd.gradcheck(run, (hidden, head.weight, head.bias))


@pytest.mark.usefixtures("small_chunks")
def test_a_head_that_is_the_embedding_too_gets_both_gradients() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(V, H)
    head = nn.Linear(H, V, bias=False)
    head.weight = table.weight
    ids, labels = torch.randint(V, (N,)), torch.randint(V, (N,))
    summed_cross_entropy(head, torch.tanh(table(ids)), labels).backward()
    got = table.weight.grad.clone()
    table.weight.grad = None
    reference(head, torch.tanh(table(ids)), labels, None).backward()
    torch.testing.assert_close(got, table.weight.grad, rtol=1e-5, atol=1e-6)


def test_bf16_sums_in_fp32() -> None:
    """A bf16 sum of 3000 losses would stand still near 1024; ours keeps the digits of fp32."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(3000, H, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V, (3000,))
    got = summed_cross_entropy(head, hidden, labels)
    got.backward()
    want = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    (theirs,) = torch.autograd.grad(want, hidden)
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.float(), theirs.float(), rtol=0.02, atol=0.01)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    head, hidden, labels = case()
    broken = hidden.detach().clone()
    broken[20, 3] = bad
    assert not torch.isfinite(summed_cross_entropy(head, broken, labels))


def test_a_label_beyond_the_vocabulary_is_an_error() -> None:
    head, hidden, labels = case()
    labels[5] = V
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        summed_cross_entropy(head, hidden, labels)


def test_huge_logits_do_not_overflow() -> None:
    head, hidden, labels = case()
    got = summed_cross_entropy(head, hidden * 1e4, labels)
    torch.testing.assert_close(got, reference(head, hidden * 1e4, labels, None), rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_no_label_gives_zero_that_can_be_derived(wrapped: bool) -> None:
    head, hidden, _ = case()
    none = torch.zeros(0, dtype=torch.int64)
    total = summed_cross_entropy(Wrapped(head) if wrapped else head, hidden[:0], none)
    assert total.detach() == 0
    if not wrapped:
        total.backward()
        assert hidden.grad.count_nonzero() == 0


def test_without_gradients_the_value_is_the_same() -> None:
    head, hidden, labels = case()
    with torch.no_grad():
        alone = summed_cross_entropy(head, hidden, labels)
    assert not alone.requires_grad
    assert torch.equal(alone, summed_cross_entropy(head, hidden, labels).detach())


def _hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, arguments, out: out * 2)
    return head


@pytest.mark.usefixtures("small_chunks")
def test_a_head_that_is_more_than_a_product_is_called_as_it_is() -> None:
    head, hidden, labels = case()
    assert is_plain(head, hidden)
    assert not is_plain(head, hidden.bfloat16())
    assert not is_plain(Wrapped(head), hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain(head, hidden)
    plain = reference(head, hidden, labels, None)
    hooked = _hooked(head)
    assert not is_plain(hooked, hidden)
    got = summed_cross_entropy(hooked, hidden, labels)
    torch.testing.assert_close(got, F.cross_entropy(hooked(hidden), labels, reduction="sum"))
    assert (got - plain).abs() > 1


class Dropping(nn.Module):
    """A head whose logits are another draw at each call."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(F.dropout(hidden, 0.5))


@pytest.mark.usefixtures("small_chunks")
def test_a_head_with_dropout_is_derived_with_the_mask_of_its_value() -> None:
    head, hidden, labels = case(torch.float64)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return summed_cross_entropy(Dropping(head), hidden, labels)

    assert torch.autograd.gradcheck(loss, [hidden.detach().requires_grad_()])


def test_the_gradient_of_bf16_states_is_scaled_in_fp32() -> None:
    head, hidden, labels = case(torch.bfloat16)
    head.requires_grad_(False)
    (whole,) = torch.autograd.grad(summed_cross_entropy(head, hidden, labels), hidden)
    (scaled,) = torch.autograd.grad(summed_cross_entropy(head, hidden, labels) / 385, hidden)
    assert torch.equal(scaled, (whole.float() / 385).bfloat16())


MEASURE = """
import sys, torch
from torch import nn
from eulerforge.config.schema import LoadPrecision
from eulerforge.models.device import base_dtype
from eulerforge.training.loss import summed_cross_entropy
torch.set_num_threads(1)
dtype = base_dtype(LoadPrecision(), torch.device("cpu"))
def high(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))
vocabulary, tokens, width = int(sys.argv[1]), 2100, 64
warm = nn.Linear(width, 1000, dtype=dtype)
summed_cross_entropy(warm, torch.randn(99, width).to(dtype).requires_grad_(), torch.zeros(99).long()).backward()
head = nn.Linear(1, 1, bias=False).requires_grad_(False)
head.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype).normal_(), requires_grad=False)
hidden = torch.empty(tokens, width, dtype=dtype).normal_().requires_grad_()
before = high("VmRSS")
summed_cross_entropy(head, hidden, torch.randint(vocabulary, (tokens,))).backward()
print(high("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's peak from /proc")
def test_memory_is_flat_in_the_vocabulary(tmp_path: Any) -> None:
    """32k against 262k at equal tokens, each in a process of its own: whole fp32 logits would be 270 and 2200 MB."""

    def kib(vocabulary: int) -> int:
        command = [sys.executable, "-c", MEASURE, str(vocabulary)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    small, large = kib(32_768), kib(262_144)
    print(f"peak of the loss: {small / 1024:.1f} MiB at 32k, {large / 1024:.1f} MiB at 262k")
    assert large < 1.2 * small
    assert large < 150 * 1024
