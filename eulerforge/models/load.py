"""Load a model and its tokenizer, and treat every missing weight as an error.

transformers fills a tensor that the files do not hold with random numbers and logs a line; a run would train on noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from eulerforge.config.schema import RunConfig
from eulerforge.errors import ModelError, first_line
from eulerforge.models.device import base_dtype
from eulerforge.models.meta import meta_model
from eulerforge.models.processor import QUANTIZED_MODES
from eulerforge.models.quantize import import_bitsandbytes, quantize_loaded, release_files
from eulerforge.models.quantized import plan_from_config
from eulerforge.models.soundness import check_folder, check_tokenizer, refuse_not_finite
from eulerforge.models.source import BaseSource, resolve_source
from eulerforge.models.stored import StoredReport, keep_stored, refuses_stored, storage_of, widen
from eulerforge.models.streamed import Halted, Streaming, forget

ATTENTION = "model.attn_implementation"


@attrs.frozen(kw_only=True)
class LoadedModel:
    """A base model in eval mode with ``use_cache`` off, its tokenizer, and where both came from.

    ``dtype`` is that of the activations and of every weight that is neither quantized nor ``stored`` as a half.
    """

    model: Any
    tokenizer: Any
    source: BaseSource
    dtype: torch.dtype
    stored: StoredReport | None = None


def load_tokenizer(
    run: RunConfig, *, source: BaseSource | None = None, say: Callable[[str], None] | None = None
) -> Any:
    """The model's tokenizer; no weights are read. ``source`` is the model's place where it is known already.

    Raises:
        ModelError: the folder has no tokenizer that transformers can load.
    """
    source = source or resolve_source(run.model_name, revision=run.model.revision, say=say)
    return _tokenizer(source.folder, run.model.trust_remote_code)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    check_folder(folder, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, use_fast=True)
    except Exception as error:
        check_tokenizer(folder)
        raise ModelError(
            f"no tokenizer can be loaded from {folder.name}: {first_line(error)}",
            key="model_name",
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def load_model(
    run: RunConfig,
    *,
    device: torch.device,
    tokenizer: Any = None,
    source: BaseSource | None = None,
    say: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load the base of a run onto ``device``; a quantized base is quantized while it is read, one tensor at a time.

    ``tokenizer`` is the model's own where it has been loaded already, ``source`` its place where it is known.

    Raises:
        ModelError: the model is not there, is damaged, or lacks weights; it cannot be quantized as asked for.
    """
    source = source or resolve_source(run.model_name, revision=run.model.revision, say=say)
    precision = run.model.load_precision
    dtype = base_dtype(precision, device)
    plan = None
    if precision.mode in QUANTIZED_MODES:
        import_bitsandbytes()
        plan = plan_from_config(source.folder, precision, dtype, remote_code=run.model.trust_remote_code)
        plan.refuse(source.name)
    check_folder(source.folder)
    storage = storage_of(precision, source.folder, device)
    if plan is not None and say is not None:
        for line in plan.lines(None if storage is None else storage.dtype):
            say(line)
    if tokenizer is None:
        tokenizer = _tokenizer(source.folder, run.model.trust_remote_code)
    streaming = None
    if plan is not None:
        streaming = Streaming(plan=plan, device=device, say=say) if not plan.shares else None
        if storage is not None:  # asked before: quantizing twice would cost more
            here = attrs.evolve(run, model_name=str(source.folder))
            storage = storage.after(meta_model(here, storage.loaded)) or storage
    model, info = _read(run, source, dtype if storage is None else storage.loaded, streaming)
    if plan is None and storage is not None and (instead := storage.after(model)):
        storage = instead
        del model  # before another is read
        model, info = _read(run, source, storage.loaded)
    _refuse_incomplete(source, info, set() if streaming is None else streaming.misfits(model))
    if say is not None and (more := sorted(info.get("unexpected_keys", ()))):
        say(f"warning: {source.name}: {len(more)} tensors have no place in the model and are left out, {more[0]} first")
    if plan is not None and streaming is None:
        refuse_not_finite(model, source.name)
        quantize_loaded(model, plan, device)
    model.to(device)
    if plan is not None:
        release_files(model)
    stored = None if storage is None else keep_stored(model, storage)
    if stored is not None and stored.fused:
        release_files(model)
    # what was rounded may have overflowed
    refuse_not_finite(model, source.name, () if streaming is None else streaming.not_finite)
    if stored and (why := refuses_stored(model)):
        widen(model)
        stored = None
        if say is not None:
            say(f"warning: {source.name}: its code reads weights of linear layers itself, so they are fp32 ({why})")
    model.config.use_cache = False
    return LoadedModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        source=source,
        dtype=dtype,
        stored=stored,
    )


def _read(
    run: RunConfig, source: BaseSource, dtype: torch.dtype, streaming: Streaming | None = None
) -> tuple[Any, dict[str, Any]]:
    """The model of a folder with its weights in ``dtype``, and what transformers has to say about its tensors.

    With ``streaming`` those of its plan are quantized as they are read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    attention = None if run.model.attn_implementation == "auto" else run.model.attn_implementation
    hf_logging.disable_progress_bar()
    loud = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # its report of the tensors would print their names as they are; ours follows
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=run.model.trust_remote_code,
            use_safetensors=True,
            # it would only raise, and not say which
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({} if streaming is None else streaming.arguments()),
        )
    except Halted as halted:
        raise halted.error from None
    except Exception as error:
        key = "model_name"
        hint = "--debug shows the whole error; a model with code of its own needs model.trust_remote_code = true"
        if attention is not None and re.search("attn|attention", str(error), re.IGNORECASE):
            key, hint = ATTENTION, f"--set {ATTENTION}=auto takes what fits the machine; --debug shows the whole error"
        raise ModelError(f"{source.name} cannot be loaded: {first_line(error)}", key=key, hint=hint) from error
    finally:
        hf_logging.set_verbosity(loud)
    if streaming is not None:
        forget(model)
    return model, info


def _refuse_incomplete(source: BaseSource, info: dict[str, Any], misfits: set[str]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted({str(item[0]) for item in info.get("mismatched_keys", ())} | misfits)
    if missing or mismatched:
        first = (missing or mismatched)[0]
        raise ModelError(
            f"{source.name}: {len(missing)} tensors are missing and {len(mismatched)} have another shape,"
            f" {first} first; they would start as random numbers",
            key="model_name",
            hint="the folder is damaged, or holds a checkpoint with adapters: merge it first (eulerforge merge)",
        )


def model_types(config: Any) -> tuple[str, ...]:
    """A config's model_type, and its text part's where it has one."""
    text = config.get_text_config()
    return tuple(dict.fromkeys((str(config.model_type), str(text.model_type))))
