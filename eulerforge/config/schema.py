"""Every key that a preset may have, apart from those of ``injection``, which belong to the strategy.

The help texts are the reference documentation: the preset reference and ``plugins show`` are made from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date as day

import attrs

from eulerforge.api.settings import InjectionConfig, setting
from eulerforge.config.suggest import nearest
from eulerforge.errors import Problem

SEED_MAX = 2**63 - 1
"""What torch, numpy and a TOML file all take."""

PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8", "int4")

ROW_KEYS = (
    "prompt", "response", "completion", "text", "messages", "role", "content", "conversations", "from", "value",
    "instruction", "input", "output", "system", "input_ids", "labels", "attention_mask",
)  # fmt: skip
"""What ``data.schema`` may rename."""


@attrs.frozen(kw_only=True)
class LoadPrecision:
    """In which precision the base is loaded; adapters are always fp32."""

    mode: str = setting(
        "auto",
        choices=PRECISIONS,
        help="Precision in which the base is stored; auto is bf16 where the device multiplies it, else as its file",
    )
    quant_type: str = setting("nf4", choices=("nf4", "fp4"), help="4-bit format of int4")
    double_quant: bool = setting(True, help="Quantize the quantization constants of int4 too")
    compute_dtype: str = setting(
        "auto",
        choices=("auto", "fp32", "fp16", "bf16"),
        help="Precision of the products and of all that is neither quantized nor stored as a half; auto is that of"
        " mode, or bf16, but fp32 on a CPU that does not multiply it",
    )
    allow_unquantized_experts: bool = setting(
        False, help="Load a mixture as int4 or int8 although its experts, most of it, do not fit and stay as they are"
    )

    def check(self) -> Iterable[Problem]:
        mode, compute = self.mode, self.compute_dtype
        if mode in ("fp32", "fp16", "bf16") and compute not in ("auto", "fp32", mode):
            yield Problem(
                key="compute_dtype",
                message=f"a base in {mode} is multiplied in {'fp32' if mode == 'fp32' else f'{mode} or fp32'}, not in"
                f" {compute}",
                hint=f"--set model.load_precision.compute_dtype=auto, or mode={compute}",
            )


@attrs.frozen(kw_only=True)
class ModelConfig:
    """How the base model is loaded."""

    load_precision: LoadPrecision = setting(factory=LoadPrecision, help="Precision of the base")
    revision: str | None = setting(None, help="Branch, tag or commit of a model on the hub")
    trust_remote_code: bool = setting(False, help="Run Python code that comes with the model; off unless you trust it")
    attn_implementation: str = setting("auto", help="transformers' attention implementation, such as sdpa or eager")


@attrs.frozen(kw_only=True)
class ValidationConfig:
    """Which rows are held out."""

    size: int | None = setting(None, ge=1, help="Number of rows held out from data.path")
    fraction: float | None = setting(None, gt=0, lt=1, help="Share of the rows held out from data.path")
    path: tuple[str, ...] = setting((), single=True, help="Files of their own with the held-out rows")
    seed: int = setting(0, ge=0, le=SEED_MAX, help="Which rows are held out")
    allow_overlap: bool = setting(False, help="Go on although held-out rows are training rows too")

    def check(self) -> Iterable[Problem]:
        given = [name for name in ("size", "fraction", "path") if getattr(self, name)]
        if len(given) > 1:
            yield Problem(key=given[1], message=f"{' and '.join(given)} exclude each other", hint="keep one of them")


@attrs.frozen(kw_only=True)
class DataConfig:
    """Where the rows come from and how they become tokens."""

    format: str = setting("raw", choices=("raw", "processed"), help="raw rows, or rows of input_ids and labels")
    task: str = setting("sft", choices=("sft",), help="What is trained: supervised fine-tuning")
    path: tuple[str, ...] = setting(
        (), single=True, help="JSON Lines files: a path, or pkg://package/file; a list is read in order"
    )
    max_length: int = setting(512, ge=2, help="Tokens of a row at most")
    template: str = setting(
        "auto",
        choices=("auto", "chat", "none"),
        help="auto: the tokenizer's chat template when it has one; none: plain",
    )
    schema: Mapping[str, str] = setting(factory=dict, help="Column names of the file, such as {prompt = 'question'}")
    system_prompt: str | None = setting(None, help="System message put before every conversation that has none")
    date: str | None = setting(
        None, help="Day (YYYY-MM-DD) told to a chat template that writes the date; default: the day the run began"
    )
    validation: ValidationConfig = setting(factory=ValidationConfig, help="Held-out rows")
    max_rows: int | None = setting(None, ge=1, help="Read this many rows at most")
    on_long: str = setting("truncate", choices=("truncate", "drop"), help="What happens to rows beyond max_length")
    max_cut_answers: float = setting(
        0.2,
        ge=0,
        le=1,
        help="Share of the rows whose answer max_length may cut before the token that ends it; beyond it the run stops",
    )
    max_stray_specials: float = setting(
        0.01,
        ge=0,
        le=1,
        help="Share of the rows that may hold a special token out of place (a second BOS, a token's text in a message);"
        " beyond it the run stops, and 1 takes a chat template that repeats the BOS too",
    )
    packing: str = setting(
        "flat",
        choices=("flat", "bins", "off"),
        help="flat: documents one after another, no padding; bins: lines of max_length; off: padded rows, sorted by "
        "length. No document is cut and none sees another; a backbone that cannot keep them apart is not packed",
    )
    share_prefixes: bool = setting(
        True,
        help="Compute once per micro-batch what its rows begin with alike, such as a system prompt: the same loss and "
        "gradient for less. With packing flat, on the CPU, where tokens meet in attention alone; elsewhere ignored",
    )
    cache: bool = setting(True, help="Keep tokenized rows in the cache folder")

    def check(self) -> Iterable[Problem]:
        for key in self.schema:
            if key not in ROW_KEYS:
                near = nearest(key, ROW_KEYS)
                hint = f"did you mean {near}?" if near else f"known: {', '.join(ROW_KEYS)}"
                yield Problem(key=f"schema.{key}", message=f"{key} is no row key", hint=hint)
        try:
            if self.date:
                day.fromisoformat(self.date)
        except ValueError:
            yield Problem(key="date", message=f"{self.date!r} is no day", hint="such as 2026-11-25")


@attrs.frozen(kw_only=True)
class PhaseConfig:
    """From ``step`` on, the groups in ``trainable`` train and all else is frozen."""

    step: int = setting(ge=0, help="First optimizer step of the phase")
    trainable: tuple[str, ...] = setting(help="Groups that train, such as lora and attn_lora")


@attrs.frozen(kw_only=True)
class TrainingConfig:
    """The optimizer and its schedule; every key that ends in ``_steps`` counts optimizer steps."""

    type: str = setting("sft", choices=("sft",), help="Kind of training")
    phases: tuple[PhaseConfig, ...] = setting((), help="Which groups train from which step on; none = all LoRA groups")
    lr: float = setting(1e-4, gt=0, help="Peak learning rate")
    weight_decay: float = setting(0.01, ge=0, help="AdamW's decoupled weight decay")
    betas: tuple[float, ...] = setting((0.9, 0.999), help="AdamW's two decay rates")
    eps: float = setting(1e-8, gt=0, help="AdamW's epsilon")
    scheduler: str = setting("cosine", choices=("cosine", "linear", "constant"), help="Learning rate after the warm-up")
    min_lr_ratio: float = setting(0.0, ge=0, le=1, help="Where cosine and linear end, as a share of lr")
    warmup_steps: int = setting(0, ge=0, help="Steps of linear warm-up")
    max_train_steps: int | None = setting(None, ge=1, help="Optimizer steps to train")
    num_epochs: float | None = setting(None, gt=0, help="Passes over the rows to train, instead of max_train_steps")
    batch_size: int = setting(
        4,
        ge=1,
        help="Times grad_accum_steps: rows of an optimizer step. Rows (packing off) or lines (bins) of a micro-batch",
    )
    grad_accum_steps: int = setting(
        1, ge=1, help="Multiplies the rows of an optimizer step, and with packing off its micro-batches"
    )
    tokens_per_micro_batch: int | None = setting(
        None,
        ge=1,
        help="Tokens of a flat micro-batch at most; default: batch_size * max_length, on the CPU at most 2048, or"
        " max_length if that is more. A longer row is a micro-batch of its own; the gradient does not depend on it",
    )
    max_grad_norm: float = setting(1.0, ge=0, help="Gradient norm to clip to; 0 = off")
    log_steps: int = setting(10, ge=1, help="Report the loss every so many steps")
    save_steps: int = setting(0, ge=0, help="Save a checkpoint every so many steps; 0 = only at the end")
    val_steps: int = setting(0, ge=0, help="Evaluate held-out rows every so many steps; 0 = only before and after")
    optimizer: str = setting(
        "adamw",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
        help="adamw keeps its state in fp32; the others, of bitsandbytes, in 8 bits; paged_adamw_8bit moves it out of a"
        " full GPU, and needs CUDA",
    )
    gradient_checkpointing: str = setting(
        "off",
        switch=("off", "all"),
        help="Decoder layers whose activations are computed again in the backward pass, to save memory: off, all,"
        " every_2 (every second one; any number), or auto (as few as the free memory needs); true and false are taken",
    )
    offload_activations: bool = setting(False, help="Keep activations in the main memory until backward; CUDA only")
    cache_frozen_prefix: bool = setting(
        False,
        help="Compute the layers below the first trained one once per row and read them from a file in later epochs",
    )
    compile: bool = setting(False, help="torch.compile the decoder layers; pays on CUDA, not on the CPU")
    deterministic: bool = setting(False, help="Use deterministic kernels on CUDA, slower")
    threads: int | None = setting(None, ge=1, help="CPU threads of torch")
    on_nonfinite: str = setting(
        "stop", choices=("stop", "skip"), help="A loss or gradient that is not finite: stop, or leave the step out"
    )
    max_skipped_steps: int = setting(10, ge=1, help="Steps that on_nonfinite = skip leaves out at most, in a whole run")

    def check(self) -> Iterable[Problem]:
        if self.max_train_steps is not None and self.num_epochs is not None:
            yield Problem(
                key="num_epochs",
                message="max_train_steps and num_epochs exclude each other",
                hint="keep one of them: --set training.max_train_steps=null takes out the preset's",
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield Problem(key="betas", message="betas are two numbers from 0 to below 1", hint="[0.9, 0.999]")
        if not re.fullmatch(r"off|all|auto|every_[1-9]\d*", self.gradient_checkpointing):
            yield Problem(
                key="gradient_checkpointing",
                message=f"{self.gradient_checkpointing!r} is not allowed",
                hint="off, all, auto, or every_N such as every_2",
            )


@attrs.frozen(kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    include_base: bool = setting(True, help="Write the base weights beside the adapters in final/")
    keep_last: int | None = setting(None, ge=1, help="Keep this many checkpoints; default: all")
    keep_best: int | None = setting(
        None,
        ge=1,
        help="Keep the checkpoints of the lowest held-out loss too, and of the others keep_last (default 1);"
        " save_steps must be a multiple of val_steps, so that each checkpoint has a loss",
    )


@attrs.frozen(kw_only=True)
class EvaluationConfig:
    """What is shown of the model before and after training."""

    samples: int = setting(0, ge=0, help="Held-out prompts that the base and the tuned model answer")
    prompts: tuple[str, ...] = setting((), help="Prompts of your own that both models answer")
    max_new_tokens: int = setting(64, ge=1, help="Length of an answer at most")
    batch_size: int | None = setting(
        None,
        ge=1,
        help="Rows of an evaluation batch; default: training.batch_size; held-out"
        " rows that are packed go by tokens_per_micro_batch, where that is set",
    )


@attrs.frozen(kw_only=True)
class RunConfig:
    """A whole run. ``strategy`` and ``injection`` come from the preset's ``injection`` table."""

    model_name: str = setting(help="Hub id, model folder, .gguf file or pkg://package/file")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N")
    backbone: str = setting("auto", help="Backbone adapter; auto picks by the model's model_type")
    seed: int = setting(42, ge=0, le=SEED_MAX, help="Seed of the adapters, the data order and the dropout")
    output_dir: str | None = setting(None, help="Folder of the run; default: runs/<preset name>")
    strategy: str = setting("dense_lora", help="Injection strategy (written as injection.strategy)")
    injection: InjectionConfig = setting(factory=InjectionConfig, help="Keys of the strategy")
    model: ModelConfig = setting(factory=ModelConfig, help="How the base is loaded")
    data: DataConfig = setting(factory=DataConfig, help="Rows")
    training: TrainingConfig = setting(factory=TrainingConfig, help="Optimizer and schedule")
    checkpoint: CheckpointConfig = setting(factory=CheckpointConfig, help="What is kept")
    evaluation: EvaluationConfig = setting(factory=EvaluationConfig, help="What is shown")

    def check(self) -> Iterable[Problem]:
        if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", self.device):
            yield Problem(key="device", message=f"{self.device!r} is no device", hint="use auto, cpu, cuda or cuda:0")

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation batch."""
        return self.evaluation.batch_size or self.training.batch_size
