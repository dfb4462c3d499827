"""A GGUF file as a Hugging Face folder, converted once and kept in the cache.

transformers dequantizes the file; the fp32 result is kept, so that nothing is rounded a second time.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eulerforge.config.atomic import commit_folder, file_state
from eulerforge.config.cachedir import cache_root
from eulerforge.config.knownhash import known_sha256
from eulerforge.errors import ModelError, first_line
from eulerforge.models.soundness import check_folder

FORMAT = 2
"""Raised whenever the conversion's result changes, so that old entries are not used."""
NEEDED = ("gguf", "accelerate")
"""What transformers wants for the conversion; it asks for the second one only when it is about to load."""


def converted_folder(path: Path, *, say: Callable[[str], None] | None = None) -> Path:
    """The cached folder of a GGUF file, made when it is not there yet (about 10 s for 135M parameters)."""
    digest, remembered = _digest(path, file_state(path))
    folder = cache_root() / "models" / f"{path.stem}-{digest[:16]}-{FORMAT}"
    if folder.is_dir():
        try:
            check_folder(folder)
            if say is not None and remembered:
                say(f"{path.name}: converted before; its sha256 {digest[:12]} is remembered, the file unchanged since")
            return folder
        except ModelError as error:
            if say is not None:
                say(f"the converted model in the cache is damaged ({error}): it is made again")
            shutil.rmtree(folder)
    if say is not None:
        say(f"converting {path.name} once into the cache")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert(path, staging)
        commit_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


@functools.lru_cache(maxsize=8)
def _digest(path: Path, state: tuple[int, ...]) -> tuple[str, bool]:
    """The file's content hash, and whether an earlier run computed it.

    A start asks several times, and ``state`` tells that the file is the same since.
    """
    return known_sha256(path)


def _convert(path: Path, out: Path) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading {path.name} needs {' and '.join(missing)}",
            key="model_name",
            hint="pip install 'eulerforge-core[gguf]'",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
            _refuse_incomplete(path, info)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except ModelError:
            raise
        except Exception as error:
            first = first_line(error)
            raise ModelError(
                f"{path.name} cannot be converted: {first}",
                key="model_name",
                hint="transformers imports llama, qwen3, gemma3 text and mixtral GGUF files",
            ) from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _refuse_incomplete(path: Path, info: Mapping[str, Any]) -> None:
    """transformers fills what the file lacks with random numbers, and the converted folder would look whole."""
    if absent := sorted(info.get("missing_keys", ())):
        raise ModelError(
            f"{path.name} lacks {len(absent)} of the model's tensors, {absent[0]} first",
            key="model_name",
            hint="a model that is split over several GGUF files is joined first, with llama-gguf-split --merge",
        )
