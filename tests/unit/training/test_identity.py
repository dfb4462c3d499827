"""What may change between the parts of a run: refused by name, allowed by name, said, or free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch

from eulerforge.config.schema import TrainingConfig
from eulerforge.errors import CheckpointError, UsageError
from eulerforge.plugins import load_registry
from eulerforge.training.identity import FREE_TRAINING, accept_changes, derived_keys, identity, soft_changes

SAVED = {"seed": 1, "training.lr": 0.1, "injection.lora_r": 4, "injection.lora_alpha": 8, "data": "a" * 64}


def test_nothing_changed() -> None:
    assert accept_changes(SAVED, dict(SAVED), []) == []


def test_every_change_is_named_with_both_values_and_the_way_on() -> None:
    now = {**SAVED, "seed": 2, "data": "b" * 64}
    with pytest.raises(CheckpointError) as refused:
        accept_changes(SAVED, now, [])
    assert [problem.key for problem in refused.value.problems] == ["seed", "data"]
    assert "was 1 at the newest checkpoint and is 2 now" in refused.value.problems[0].message
    assert "was aaaaaaaaaaaa at the newest" in refused.value.problems[1].message
    assert "--allow-changed seed" in (refused.value.problems[0].hint or "")


def test_an_allowed_change_is_given_back_and_the_others_are_still_refused() -> None:
    now = {**SAVED, "seed": 2, "training.lr": 0.2}
    assert accept_changes(SAVED, now, ["seed", "training.lr"]) == [
        {"key": "seed", "was": 1, "now": 2},
        {"key": "training.lr", "was": 0.1, "now": 0.2},
    ]
    with pytest.raises(CheckpointError) as refused:
        accept_changes(SAVED, now, ["seed"])
    assert [problem.key for problem in refused.value.problems] == ["training.lr"]


def test_a_key_covers_those_below_it_and_not_those_that_begin_alike() -> None:
    now = {**SAVED, "injection.lora_r": 2, "injection.lora_alpha": 4}
    assert len(accept_changes(SAVED, now, ["injection"])) == 2
    with pytest.raises(CheckpointError):
        accept_changes(SAVED, now, ["injection.lora_r"])


def test_a_key_that_no_run_has_is_a_usage_error_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="--allow-changed sed") as refused:
        accept_changes(SAVED, SAVED, ["sed"])
    assert refused.value.problems[0].hint == "did you mean seed?"


@pytest.mark.parametrize("given", ["data.path", "data.max_length", "data.validation.size", "data"])
def test_the_keys_of_the_rows_mean_the_facts_of_the_rows(given: str) -> None:
    saved = {"data": "a" * 64, "data.validation": "b" * 64, "data.packing": "flat"}
    rows = {**saved, "data": "c" * 64, "data.validation": "d" * 64}
    assert [fact["key"] for fact in accept_changes(saved, rows, [given])] == ["data", "data.validation"]
    if given != "data":
        with pytest.raises(CheckpointError):
            accept_changes(saved, {**rows, "data.packing": "off"}, [given])


def test_packing_does_not_stand_for_the_rows() -> None:
    saved = {"data": "a" * 64, "data.packing": "flat"}
    with pytest.raises(CheckpointError):
        accept_changes(saved, {**saved, "data": "b" * 64}, ["data.packing"])


FOLLOWING: dict[str, tuple[dict[str, Any], str, str]] = {
    "token budget": ({"training__batch_size": 1}, "training.batch_size", "training.tokens_per_micro_batch"),
    "phases": ({"injection__attn_lora__enabled": False}, "injection.attn_lora.enabled", "training.phases"),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_value_that_nobody_set_follows_the_key_that_it_comes_from(make_run: Callable[..., Any], name: str) -> None:
    changes, key, follows = FOLLOWING[name]
    run, other = make_run(), make_run(**changes)
    derived = derived_keys(other.config)
    with pytest.raises(CheckpointError) as refused:
        accept_changes(of(run), of(other), [], derived=derived)
    assert [problem.key for problem in refused.value.problems] == [key]
    assert {fact["key"] for fact in accept_changes(of(run), of(other), [key], derived=derived)} == {key, follows}
    # set by hand it is a change of its own
    with pytest.raises(CheckpointError) as refused:
        accept_changes(of(run), of(other), [key])
    assert [problem.key for problem in refused.value.problems] == [follows]


def test_what_nobody_set_is_known(make_run: Callable[..., Any]) -> None:
    automatic = make_run(training__max_train_steps=None, model__load_precision__mode="auto")
    assert derived_keys(automatic.config).keys() == {
        "training.tokens_per_micro_batch", "training.phases", "training.max_train_steps", "model.load_precision.mode",
        "model.load_precision.compute_dtype",
    }  # fmt: skip
    assert derived_keys(automatic.config).keys() <= of(automatic, 4).keys()


def test_where_the_tensors_do_not_fit_no_permission_is_offered() -> None:
    now = {**SAVED, "injection.lora_r": 8, "seed": 2}
    with pytest.raises(CheckpointError) as refused:
        accept_changes(SAVED, now, [], fits=lambda: False)
    hints = {problem.key: problem.hint or "" for problem in refused.value.problems}
    assert "--allow-changed" not in hints["injection.lora_r"]
    assert "put it back" in hints["injection.lora_r"]
    assert "another --output-dir" in hints["injection.lora_r"]
    assert "--allow-changed seed" in hints["seed"]


def test_only_a_refused_place_asks_whether_the_tensors_fit() -> None:
    asked: list[bool] = []

    def fits() -> bool:
        asked.append(True)
        return False

    assert accept_changes(SAVED, dict(SAVED), [], fits=fits) == []
    assert len(accept_changes(SAVED, {**SAVED, "injection.lora_r": 8}, ["injection"], fits=fits)) == 1
    with pytest.raises(CheckpointError):
        accept_changes(SAVED, {**SAVED, "seed": 2}, [], fits=fits)
    assert not asked
    with pytest.raises(CheckpointError):
        accept_changes(SAVED, {**SAVED, "injection.lora_r": 8, "injection.lora_alpha": 2}, [], fits=fits)
    assert asked == [True]


def test_a_fact_that_an_older_version_did_not_record_is_no_change_and_a_lost_one_is() -> None:
    assert accept_changes(SAVED, {**SAVED, "training.new": 1}, []) == []
    with pytest.raises(CheckpointError) as refused:
        accept_changes({**SAVED, "plugins.gone": "1.0"}, SAVED, [])
    assert refused.value.problems[0].key == "plugins.gone"


def test_soft_facts_are_compared_where_both_parts_know_them() -> None:
    old = {"eulerforge": "1", "libraries": {"torch": "2.11", "numpy": "2"}, "threads": 1, "seed": 1}
    new = {"eulerforge": "1", "libraries": {"torch": "2.13", "bitsandbytes": "0"}, "threads": 2, "seed": 2}
    assert soft_changes(old, new) == [
        {"key": "libraries.torch", "was": "2.11", "now": "2.13"},
        {"key": "threads", "was": 1, "now": 2},
    ]
    assert soft_changes({}, new) == []


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 7}, "seed"),
    "rank": ({"injection__lora_r": 2}, "injection.lora_r"),
    "alpha": ({"injection__lora_alpha": 4}, "injection.lora_alpha"),
    "dropout": ({"injection__lora_dropout": 0.5}, "injection.lora_dropout"),
    "targets": ({"injection__target_keywords": ["up_proj"]}, "injection.target_keywords"),
    "layers": ({"injection__start_layer": 1}, "injection.start_layer"),
    "batch cut": ({"training__batch_size": 1}, "training.batch_size"),
    "accumulation": ({"training__grad_accum_steps": 2}, "training.grad_accum_steps"),
    "lr": ({"training__lr": 0.5}, "training.lr"),
    "scheduler": ({"training__scheduler": "linear"}, "training.scheduler"),
    "warm-up": ({"training__warmup_steps": 2}, "training.warmup_steps"),
    "length under a curve": ({"training__max_train_steps": 9}, "training.max_train_steps"),
    "clipping": ({"training__max_grad_norm": 0.5}, "training.max_grad_norm"),
    "weight decay": ({"training__weight_decay": 0.5}, "training.weight_decay"),
    "phases": (
        {"training__phases": [{"step": 0, "trainable": ["lora"]}, {"step": 2, "trainable": ["attn_lora"]}]},
        "training.phases",
    ),
    "cut rows": ({"data__max_length": 32, "data__max_cut_answers": 1}, "data"),
    "held-out rows": ({"data__validation__size": 3}, "data.validation"),
    "packing": ({"data__packing": "off"}, "data.packing"),
    "token budget": ({"training__tokens_per_micro_batch": 128}, "training.tokens_per_micro_batch"),
    "template": ({"data__template": "none"}, "data"),
    "precision": ({"model__load_precision__mode": "bf16"}, "model.load_precision.mode"),
    "attention": ({"model__attn_implementation": "eager"}, "model.attn_implementation"),
    "skipping": ({"training__on_nonfinite": "skip"}, "training.on_nonfinite"),
}


def of(run: Any, total_steps: int | None = None) -> dict[str, Any]:
    total = total_steps or run.config.training.max_train_steps
    return identity(run, load_registry(), {"sha256": "w" * 64}, total)


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_numbers_is_in_the_identity(make_run: Callable[..., Any], name: str) -> None:
    changes, key = CHANGES[name]
    with pytest.raises(CheckpointError) as refused:
        accept_changes(of(make_run()), of(make_run(**changes)), [])
    assert key in [problem.key for problem in refused.value.problems]


FREE: dict[str, dict[str, Any]] = {
    "log_steps": {"training__log_steps": 3},
    "save_steps": {"training__save_steps": 3},
    "val_steps": {"training__val_steps": 3},
    "gradient_checkpointing": {"training__gradient_checkpointing": True},
    "threads": {"training__threads": 1},
    "max_skipped_steps": {"training__max_skipped_steps": 3},
    "keep_last": {"checkpoint__keep_last": 1, "checkpoint__include_base": False},
    "evaluation": {"evaluation__max_new_tokens": 5, "evaluation__batch_size": 1},
    "backbone": {"backbone": "auto"},
}


@pytest.mark.parametrize("name", FREE)
def test_what_changes_nothing_that_is_trained_is_free(make_run: Callable[..., Any], name: str) -> None:
    assert accept_changes(of(make_run()), of(make_run(**FREE[name])), []) == []


def test_an_automatic_precision_is_the_one_that_it_comes_to(make_run: Callable[..., Any]) -> None:
    auto = make_run(model__load_precision__mode="auto")
    named = make_run(model__load_precision__mode={torch.float32: "fp32", torch.bfloat16: "bf16"}[auto.dtype])
    assert accept_changes(of(auto), of(named), []) == []


def test_a_run_without_a_curve_may_be_made_longer(make_run: Callable[..., Any]) -> None:
    short, long = (make_run(training__scheduler="constant", training__max_train_steps=steps) for steps in (4, 9))
    assert accept_changes(of(short), of(long), []) == []


def test_epochs_and_steps_that_mean_the_same_length_are_no_change(make_run: Callable[..., Any]) -> None:
    by_epochs = make_run(training__max_train_steps=None, training__num_epochs=1.0)
    assert accept_changes(of(make_run(), 12), of(by_epochs, 12), []) == []


def test_another_version_of_a_plugin_that_took_part_is_refused(make_run: Callable[..., Any]) -> None:
    now = of(make_run())
    plugins = {key: value for key, value in now.items() if key.startswith("plugins.")}
    assert {key.rpartition(":")[2] for key in plugins} == {"llama3", "dense_lora", "phases"}
    key = next(iter(plugins))
    with pytest.raises(CheckpointError) as refused:
        accept_changes({**now, key: "0.0.1"}, now, [])
    assert refused.value.problems[0].key == key


def test_the_free_keys_exist() -> None:
    assert set(FREE_TRAINING) <= {field.name for field in attrs.fields(TrainingConfig)}
