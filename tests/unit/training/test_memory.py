"""Sizes, the advice after an out-of-memory stop, and the count of what autograd keeps."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinyrun
import torch
from torch import nn

from eulerforge.cli.main import main
from eulerforge.errors import RunError
from eulerforge.models.sizes import gib
from eulerforge.plugins import load_registry
from eulerforge.training.limits import Room
from eulerforge.training.memory import KeptForBackward, Shortage, advice, out_of_memory_advice, peak_bytes
from eulerforge.training.peak import MicroBatch


def test_gib() -> None:
    assert gib(1536 * 2**20) == "1.50 GiB"
    assert gib(2**20) == "1.0 MiB"


def test_the_peak_is_the_high_water_mark_of_the_process() -> None:
    status = Path("/proc/self/status").read_text()
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
    assert peak_bytes(torch.device("cpu")) == pytest.approx(kilobytes * 1024, rel=0.05)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


FEWER = {
    "flat": "training.tokens_per_micro_batch=384 (now 768; the result stays the same)",
    "bins": "training.batch_size=3 with training.grad_accum_steps=4 (now 6 and 2",
}


@pytest.mark.parametrize("packing", list(FEWER))
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_becomes_advice_with_the_run_s_numbers(tmp_path: Path, error: Exception, packing: str) -> None:
    config = tinyrun.loaded(
        tmp_path, training__batch_size=6, training__grad_accum_steps=2, data__packing=packing, device="cpu"
    ).run
    with pytest.raises(RunError, match="out of memory: ") as failed, out_of_memory_advice(config):
        raise error
    assert "\n" not in str(failed.value)
    hint = failed.value.problems[0].hint or ""
    parts = [
        "model.load_precision.mode=int4 (now fp32)",
        FEWER[packing],
        "training.gradient_checkpointing=all",
        "data.max_length (now 128)",
        "injection.lora_r (now 4)",
    ]
    places = [hint.find(part) for part in parts]
    assert min(places) >= 0, hint
    assert places == sorted(places)


def hint_after(config: Any, estimate: Callable[[], Any]) -> str:
    """The hint of a run that failed for memory once its estimate could be asked."""

    def failing() -> None:
        with out_of_memory_advice(config) as shortage:
            shortage.estimate = estimate
            raise MemoryError

    with pytest.raises(RunError) as failed:
        failing()
    return failed.value.problems[0].hint or ""


@pytest.mark.parametrize("packing", ["flat", "off"])
def test_the_advice_has_the_estimate_and_a_micro_batch_that_fits_it(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    run = make_run(training__batch_size=8, data__packing=packing, estimates=True)
    estimator, longest = run.estimated.estimator, run.config.data.max_length
    # room for two rows of the longest, and not for the largest micro-batch that the rows give
    two = estimator.estimate(MicroBatch.of_rows(2, longest, packed=packing == "flat"), 0)
    free = two.peak - two.base + 1000
    estimator.room = Room(base=two.base, free=free)
    run.estimated.__dict__["found"] = estimator.estimate(MicroBatch.of_rows(8, longest, packed=packing == "flat"), 0)
    hint = hint_after(run.config, lambda: run.estimated)
    assert f"the largest that fits is {2 * longest} tokens, 2 rows; " in hint
    wanted = {"flat": f"training.tokens_per_micro_batch={2 * longest} ", "off": "training.batch_size=2 with "}
    assert wanted[packing] in hint


def test_advice_says_when_the_run_was_estimated_to_fit(make_run: Callable[..., Any]) -> None:
    run = make_run(estimates=True)
    hint = hint_after(run.config, lambda: run.estimated)
    assert "less than was needed, or another process or limit took the rest; try, in this order" in hint


def test_an_estimate_that_fails_costs_no_advice(tmp_path: Path) -> None:
    config = tinyrun.loaded(tmp_path).run

    def fails() -> Any:
        raise MemoryError

    assert hint_after(config, fails) == advice(config)


def test_a_run_tells_how_its_estimate_is_made(make_run: Callable[..., Any], prepared: Path) -> None:
    from eulerforge.training.assemble import assemble

    run = make_run()
    shortage = Shortage(run.config)
    assemble(run.config, load_registry(), out=run.out, shortage=shortage)
    assert shortage.hint().startswith("estimated ")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    config = tinyrun.loaded(tmp_path).run
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_advice(config):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize(("batch", "accum"), [(2, 1), (3, 1), (5, 1), (5, 4), (7, 3), (8, 2), (9, 1)])
def test_the_smaller_batch_has_the_same_rows_per_step(tmp_path: Path, batch: int, accum: int) -> None:
    config = tinyrun.loaded(
        tmp_path, training__batch_size=batch, training__grad_accum_steps=accum, data__packing="off"
    ).run
    found = re.search(r"batch_size=(\d+) with training.grad_accum_steps=(\d+)", advice(config))
    assert found is not None
    smaller, more = map(int, found.groups())
    assert smaller < batch
    assert smaller * more == batch * accum


def test_advice_names_only_what_can_still_be_changed(tmp_path: Path) -> None:
    config = tinyrun.loaded(
        tmp_path, training__batch_size=1, injection__lora_r=1, training__gradient_checkpointing=True,
        model__load_precision__mode="int4",
    ).run  # fmt: skip
    assert advice(config) == "try, in this order, --set a smaller data.max_length (now 128)"


def test_advice_names_no_quantization_that_would_be_refused(tmp_path: Path) -> None:
    config = tinyrun.loaded(tmp_path).run
    assert "int4" in advice(config)
    assert "int4" not in advice(config, experts=True)
    phases = [{"step": 0, "trainable": ["lora", "base_ffn"]}]
    assert "int4" not in advice(tinyrun.loaded(tmp_path, training__phases=phases).run)


@pytest.mark.parametrize(("family", "fused"), [("llama", False), ("mixtral", True)])
def test_a_run_knows_its_fused_experts(tmp_path: Path, family: str, fused: bool) -> None:
    from eulerforge.training.estimated import Estimated, from_config

    tinyrun.prepare(tmp_path, family=family)
    config = tinyrun.loaded(tmp_path, backbone="auto").run
    found = from_config(config, load_registry(), tmp_path / "base", None, torch.device("cpu"))
    assert isinstance(found, Estimated)
    assert found.has_fused_experts() == fused


def test_what_autograd_keeps_is_counted_once_and_without_parameters() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    kept = KeptForBackward(layer)
    with kept.hooks():
        y = layer(x)  # keeps x (128 bytes) and the weight
        (y * y).sum()  # keeps y twice: one storage of 128 bytes
    assert kept.bytes == 256


def test_graph_and_gradients_of_a_pass_are_gone_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eulerforge.training import loop

    nodes: list[weakref.ref[Any]] = []
    gradients: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    real, total = loop.label_token_loss, torch.nn.utils.get_total_norm

    def forward(*arguments: Any) -> Any:
        alive.append(sum(one() is not None for one in [*nodes, *gradients]))
        loss, label_tokens = real(*arguments)
        nodes.append(weakref.ref(loss.grad_fn))  # that of a Function in Python lives as long as the graph
        return loss, label_tokens

    def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
        gradients.extend(weakref.ref(tensor) for tensor in tensors)
        return total(tensors)

    monkeypatch.setattr(loop, "label_token_loss", forward)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    tinyrun.prepare(tmp_path)
    assert main(tinyrun.arguments(tmp_path)) == 0
    assert nodes
    assert gradients
    assert alive == [0] * len(alive)
