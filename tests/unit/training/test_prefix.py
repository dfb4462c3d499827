"""The frozen prefix: the same training with it as without, read in later epochs, refused where it would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tinyrun
import torch

from eulerforge.errors import ConfigError, RunError, UsageError
from eulerforge.training import prefix as prefix_room

ROWS, BATCH = 12, 3


@pytest.fixture
def half(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs of 12 rows and four layers of which the upper two are adapted."""
    monkeypatch.setenv("EULERFORGE_CACHE", str(tmp_path / "cache"))
    folders: dict[str, Any] = {}

    def make(family: str = "llama", **changes: Any) -> Any:
        if family not in folders:
            folders[family] = tinyrun.prepare(tmp_path / family, family, rows=ROWS, num_hidden_layers=4)
        keys = {
            "injection__start_layer": 2,
            "injection__lora_dropout": 0.1,
            "training__batch_size": BATCH,
            "training__lr": 0.001,
            "data__cache": False,
            # cached states lie row by row, and dropout draws otherwise where rows share a part
            "data__share_prefixes": False,
        }
        return tinyrun.assembled(folders[family], family, **{**keys, **changes})

    return make


def trained(run: Any, steps: int) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    """Adapters and losses after some steps, and how often each layer ran."""
    calls = [0] * 4
    for at, layer in enumerate(run.model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, at=at: calls.__setitem__(at, calls[at] + 1))
    tinyrun.train_steps(run, steps)
    losses = [row["loss"] for row in tinyrun.metrics(run.out)]
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}, losses, calls


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("packing", ["flat", "bins", "off"])
def test_three_epochs_with_it_equal_three_without(half: Callable[..., Any], family: str, packing: str) -> None:
    steps = 3 * ROWS // BATCH
    plain, losses, every = trained(half(family, data__packing=packing, output_dir=None), steps)
    run = half(family, data__packing=packing, training__cache_frozen_prefix=True)
    read, again, calls = trained(run, steps)
    assert again == pytest.approx(losses, rel=1e-5)
    for name in plain:
        torch.testing.assert_close(read[name], plain[name], rtol=1e-3, atol=1e-5)
    assert calls[0] == calls[1] == every[0] // 3, "the lower half runs in the first epoch alone"
    assert calls[2] == calls[3] == every[3]
    names = [name for name, _ in run.model.named_parameters()]
    assert any(".layers.0." in name for name in names), "the layers are back in their places"


@pytest.mark.parametrize("packing", ["flat", "bins"])
def test_lines_that_are_filled_up_to_whole_sixteens_are_read_too(
    half: Callable[..., Any], packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eulerforge.data.packing.CPU_STEP_FROM", 32)
    steps = 2 * ROWS // BATCH
    _, losses, _ = trained(half(data__packing=packing, output_dir=None), steps)
    run = half(data__packing=packing, training__cache_frozen_prefix=True)
    wide = [sum(len(run.datasets.train.row(index)[0]) for index in range(at, at + BATCH)) for at in range(ROWS - BATCH)]
    assert any(width >= 32 and width % 16 for width in wide)
    _, again, calls = trained(run, steps)
    assert again == pytest.approx(losses, rel=1e-5)
    assert calls[0] == steps // 2


def test_the_file_has_the_stated_size_and_no_name(half: Callable[..., Any], tmp_path: Any) -> None:
    run = half(training__cache_frozen_prefix=True)
    tokens = int(run.datasets.train.lengths.sum())
    assert run.prefix.bytes == tokens * run.model.config.hidden_size * 4
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("prefix-")]


def test_a_full_disk_is_refused_with_the_numbers(half: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(prefix_room.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(UsageError, match="are free in"):
        half(training__cache_frozen_prefix=True)


def test_a_phase_that_trains_the_base_below_is_refused(half: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="layer 0 trains"):
        half(training__cache_frozen_prefix=True, injection__start_layer=0)
    run = half()
    below = (*run.phases.trained_names, "model.layers.1.mlp.up_proj.weight")
    assert prefix_room.first_trained_layer(run.model, below) == 1
    phases = [{"step": 0, "trainable": ["lora", "attn_lora"]}, {"step": 2, "trainable": ["base_ffn"]}]
    assert half(training__cache_frozen_prefix=True, training__phases=phases).prefix.first == 2


def test_dropout_below_is_refused(half: Callable[..., Any]) -> None:
    run = half()
    run.model.get_decoder().layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"drops out with 0\.1"):
        prefix_room.first_trained_layer(run.model, run.phases.trained_names)


def test_a_trained_embedding_is_refused(half: Callable[..., Any]) -> None:
    run = half()
    with pytest.raises(ConfigError, match="the embedding trains"):
        prefix_room.first_trained_layer(run.model, (*run.phases.trained_names, "model.embed_tokens.weight"))


def test_a_model_whose_upper_layers_read_more_is_found_out(half: Callable[..., Any]) -> None:
    run = half(training__cache_frozen_prefix=True)
    lower, upper = run.model.get_decoder().layers[0], run.model.get_decoder().layers[3]
    aside: list[torch.Tensor] = [torch.zeros(())]
    lower.register_forward_hook(lambda _m, _a, states: aside.__setitem__(0, states.sum()))
    upper.register_forward_hook(lambda _m, _a, states: states + aside[0])

    def forget(*_: Any) -> None:
        aside[0] = torch.zeros(())

    run.model.get_decoder().register_forward_pre_hook(forget)
    with pytest.raises(RunError, match="read more of the lower ones"):
        run.prefix.prove(run.model)
