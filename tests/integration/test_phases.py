"""Groups that pause: bit-identical while frozen, and afterwards they go on with the optimizer state that they had."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinyrun
import torch
from safetensors.torch import load_file

from eulerforge.cli.main import main

PHASES = [
    {"step": 0, "trainable": ["lora"]},
    {"step": 2, "trainable": ["attn_lora"]},
    {"step": 4, "trainable": ["lora", "attn_lora"]},
]
TOTAL = 6
TRAINING = {"training__phases": PHASES, "training__weight_decay": 0.1, "training__max_train_steps": TOTAL}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tinyrun.prepare(tmp_path_factory.mktemp("phases"))
    assert main(tinyrun.arguments(folder, training__save_steps=1, **TRAINING)) == 0
    return folder / "run"


def group(name: str) -> str:
    return "attn_lora" if ".self_attn." in name else "lora"


def changed(run: Path, file: str, before: int, after: int) -> dict[str, set[str]]:
    """Names of the tensors that differ between two checkpoints, by group."""
    old, new = (load_file(run / f"checkpoint-{step}" / file) for step in (before, after))
    found: dict[str, set[str]] = {"lora": set(), "attn_lora": set()}
    for name, tensor in new.items():
        if name not in old or not torch.equal(old[name], tensor):
            found[group(name)].add(name)
    return found


@pytest.mark.parametrize(
    ("before", "after", "trained"),
    [(1, 2, {"lora"}), (2, 3, {"attn_lora"}), (3, 4, {"attn_lora"}), (4, 5, {"lora", "attn_lora"})],
)
def test_a_frozen_group_is_bit_identical_and_so_is_its_optimizer_state(
    run: Path, before: int, after: int, trained: set[str]
) -> None:
    adapters = load_file(run / f"checkpoint-{after}" / "adapter.safetensors")
    for file in tinyrun.FILES:
        moved = changed(run, file, before, after)
        assert {name for name, tensors in moved.items() if tensors} == trained
    moved = changed(run, "adapter.safetensors", before, after)
    for name in trained:
        assert moved[name] == {tensor for tensor in adapters if group(tensor) == name}


def test_the_step_counter_of_each_group_counts_its_own_updates(run: Path) -> None:
    counts = {2: {"lora": 2}, 3: {"lora": 2, "attn_lora": 1}, 6: {"lora": 4, "attn_lora": 4}}
    for step, want in counts.items():
        state = load_file(run / f"checkpoint-{step}" / "optimizer.safetensors")
        found = {group(name): float(tensor) for name, tensor in state.items() if name.endswith(":step")}
        assert found == want


def test_the_phase_of_each_step_is_in_the_metrics(run: Path) -> None:
    phases = {row["step"]: row["phase"] for row in tinyrun.metrics(run) if "phase" in row}
    assert [phases[step] for step in (1, 2)] == [["lora"]] * 2
    assert [phases[step] for step in (3, 4)] == [["attn_lora"]] * 2
    assert [phases[step] for step in (5, 6)] == [["lora", "attn_lora"]] * 2


def test_a_phased_run_equals_a_plain_loop_over_the_same_rows(run: Path) -> None:
    """torch's unfused AdamW, transformers' loss, requires_grad switched by hand."""
    from eulerforge.data.batches import BatchPlan, collate
    from eulerforge.training.optimizer import learning_rate

    made = tinyrun.assembled(run.parent, output_dir=str(run.parent / "reference"), **TRAINING)
    model, config = made.model.train(), made.config.training
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.1, foreach=False, fused=False)
    plan = BatchPlan(made.datasets.train, 2, 1, made.config.seed)
    for step in range(TOTAL):
        wanted = [phase["trainable"] for phase in PHASES if phase["step"] <= step][-1]
        for name, parameter in parameters.items():
            parameter.requires_grad_(group(name) in wanted)
        optimizer.param_groups[0]["lr"] = learning_rate(step, TOTAL, config)
        batch = collate(made.datasets.train, plan.step_rows(step)[0], made.pad_id, "cpu")
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=tinyrun.labels_of(batch),
            use_cache=False,
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    found = load_file(run / "final" / "adapter.safetensors")
    for name, parameter in parameters.items():
        # rows are packed in the run and padded here; Adam divides a tiny gradient's rounding by its own size, which on
        # a processor with AVX2 alone moved one number by 1.1e-4; a step that trains the wrong group moves all by 1e-2
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=5e-4)


def test_base_weights_train_when_a_phase_names_them_and_only_then(tmp_path: Path) -> None:
    tinyrun.prepare(tmp_path)
    phases = [{"step": 0, "trainable": ["lora", "attn_lora"]}, {"step": 2, "trainable": ["base_ffn"]}]
    changes = {"training__phases": phases, "training__max_train_steps": 4, "training__save_steps": 2}
    assert main(tinyrun.arguments(tmp_path, **changes)) == 0
    base = load_file(tmp_path / "base" / "model.safetensors")
    early = load_file(tmp_path / "run" / "checkpoint-2" / "adapter.safetensors")
    late = load_file(tmp_path / "run" / "checkpoint-4" / "adapter.safetensors")
    for name in early:
        if name.endswith("base_layer.weight"):
            plain = base[name.replace(".base_layer", "")]
            assert torch.equal(early[name], plain)
            assert not torch.equal(late[name], plain)
        else:
            assert torch.equal(early[name], late[name])
    assert sum(name.endswith("base_layer.weight") for name in early) == 9


def test_experts_below_adapters_are_not_named_as_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their layer gives the base weights no gradient: the run would end with them as they were, and say nothing."""
    tinyrun.prepare(tmp_path, "mixtral")
    phases = [{"step": 0, "trainable": ["lora", "base_ffn"]}]
    assert main(tinyrun.arguments(tmp_path, backbone="mixtral", training__phases=phases)) == 2
    said = capsys.readouterr().err
    assert "error: training.phases: the group base_ffn cannot train" in said
    assert "gives its base no gradient" in said
    assert "hint: take base_ffn out of training.phases, or the keywords of experts out of" in said
