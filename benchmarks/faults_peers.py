"""What PEFT + TRL do when the faults of docs/reliability.md meet them: each is made, and what happens is printed.

Run it where trl, peft, accelerate and datasets are installed; it needs no network and no GPU:

    python benchmarks/faults_peers.py FOLDER

One JSON line per fault: what the trainer did, its first error line or None, and its log lines about it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

import tiny  # noqa: E402
import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

STEPS = 6


def trainer(folder: Path, out: Path, rows: Path, lora: dict[str, Any] | None = None, **options: Any) -> SFTTrainer:
    """An SFTTrainer as its documents show it, on a tiny model, with a checkpoint every second step."""
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
    config = SFTConfig(
        **{
            "output_dir": str(out),
            "max_steps": STEPS,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.02,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "max_length": 128,
            **options,
        }
    )
    shape = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **(lora or {})}
    return SFTTrainer(
        model=str(folder / "base"),
        args=config,
        train_dataset=data,
        processing_class=tiny.tiny_tokenizer(),
        peft_config=LoraConfig(**shape, task_type="CAUSAL_LM"),
    )


def observed(action: Callable[[], Any]) -> dict[str, Any]:
    """The outcome of an action, the first line of its error, and what was logged or warned meanwhile."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    logging.getLogger("transformers").addHandler(handler)
    error = None
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
        try:
            action()
        except Exception as caught:  # noqa: BLE001 - whatever it is, it is what the peer does
            error = f"{type(caught).__name__}: {(str(caught).splitlines() or [''])[0]}"
    logging.getLogger().removeHandler(handler)
    logging.getLogger("transformers").removeHandler(handler)
    said = [line for line in heard.getvalue().splitlines() if line.strip() and not line.lstrip().startswith("{'")]
    return {"error": error, "said": said[-6:]}


def final_adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoint-{STEPS}" / "adapter_model.safetensors")


def same(left: Path, right: Path) -> bool:
    ours, theirs = final_adapter(left), final_adapter(right)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def prepare(folder: Path) -> Path:
    """A folder anew, with a tiny model and rows in TRL's words; gives back the rows' file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tiny.save_tiny(folder / "base")
    rows = tiny.write_rows(folder / "rows.jsonl", 24)
    rows.write_text(rows.read_text().replace('"response"', '"completion"'))
    return rows


def main(folder: Path) -> None:
    rows = prepare(folder)
    straight = folder / "straight"
    trainer(folder, straight, rows).train()

    def copy(name: str, keep: int = 4) -> Path:
        out = folder / name
        shutil.copytree(straight, out)
        shutil.rmtree(out / f"checkpoint-{STEPS}")
        assert (out / f"checkpoint-{keep}").is_dir()
        return out

    def resume(out: Path, data: Path = rows, **options: Any) -> Callable[[], Any]:
        return lambda: trainer(folder, out, data, **options).train(resume_from_checkpoint=True)

    def show(fault: str, result: dict[str, Any], **facts: Any) -> None:
        print(json.dumps({"fault": fault, **result, **facts}), flush=True)

    out = copy("control")
    result = observed(resume(out))
    show("none: an undisturbed resume", result, bit_identical=same(straight, out))

    out = copy("truncated")
    path = out / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    show("newest checkpoint truncated, an intact one beside it", observed(resume(out)))

    out = copy("optimizer")
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    result = observed(resume(out))
    show("optimizer file missing", result, bit_identical=same(straight, out) if result["error"] is None else None)

    out = copy("scheduler")
    path = out / "checkpoint-4" / "rng_state.pth"
    if path.exists():
        path.unlink()
        result = observed(resume(out))
        show("random state missing", result, bit_identical=same(straight, out) if result["error"] is None else None)

    out = copy("reordered")
    other = folder / "reordered.jsonl"
    other.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    result = observed(resume(out, other))
    show("data reordered between the parts", result, bit_identical=same(straight, out) if not result["error"] else None)

    out = copy("seed")
    result = observed(resume(out, seed=7, data_seed=7))
    show("seed changed between the parts", result, bit_identical=same(straight, out) if not result["error"] else None)

    out = copy("lr")
    result = observed(resume(out, learning_rate=0.001))
    show("learning rate changed", result, bit_identical=same(straight, out) if not result["error"] else None)

    changes: dict[str, dict[str, Any]] = {
        "rank": {"lora": {"r": 8}},
        "alpha": {"lora": {"lora_alpha": 64}},
        "fewer targets": {"lora": {"target_modules": ["q_proj"]}},
        "more targets": {"lora": {"target_modules": ["q_proj", "k_proj", "v_proj"]}},
        "adapter's dropout": {"lora": {"lora_dropout": 0.5}},
        "batch size": {"per_device_train_batch_size": 4},
        "batch cut": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "schedule": {"lr_scheduler_type": "cosine"},
        "precision": {"bf16": True},
    }
    for name, change in changes.items():
        out = copy(name.replace(" ", "-"))
        result = observed(resume(out, **change))
        show(f"{name} changed", result, bit_identical=same(straight, out) if not result["error"] else None)

    out = folder / "nan"
    result = observed(lambda: trainer(folder, out, rows, learning_rate=1e38, max_grad_norm=0.0).train())
    saved = final_adapter(out) if (out / f"checkpoint-{STEPS}").is_dir() else {}
    bad = sum(not bool(torch.isfinite(tensor).all()) for tensor in saved.values())
    show("the loss becomes NaN", result, tensors_not_finite_in_the_last_checkpoint=f"{bad} of {len(saved)}")

    # one bad row, far down: which line does the error name?
    line = 30_000
    many = folder / "many.jsonl"
    good = rows.read_text().splitlines()[0]
    many.write_text("".join(f"{good}\n" for _ in range(line - 1)) + good[:-3] + "\n" + f"{good}\n" * 100)
    began = time.perf_counter()
    result = observed(lambda: load_dataset("json", data_files=str(many), cache_dir=str(folder / "cache2")))
    show(f"a malformed row at line {line}", result, seconds=round(time.perf_counter() - began, 1))

    out = folder / "used"
    shutil.copytree(straight, out)
    result = observed(lambda: trainer(folder, out, rows, learning_rate=0.001).train())
    show("a second run into a used folder", result, first_run_s_adapter_still_there=same(straight, out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
