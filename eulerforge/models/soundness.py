"""What can be told of a model folder by looking: files that are damaged, absent, or do not belong together.

Only JSON files and the headers of safetensors are read here; transformers would fail on some of this with an error of
its own inner workings, and take the rest as it is.
A header is the length of a JSON text (8 bytes, little endian) and the text: {name: {dtype, shape, data_offsets}}.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from eulerforge.config.atomic import file_state
from eulerforge.errors import ModelError
from eulerforge.models.experts import SCALES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
ADAPTER = "adapter_config.json"
TOKENIZER = "tokenizer.json"
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
HINT = "get the base model again"
MAX_HEADER = 100 << 20
"""Bytes; safetensors itself takes no longer one."""
PIECE_NUMBERS = 1 << 22
"""Numbers of a weight that are looked at together."""
_SOUND: set[tuple[object, ...]] = set()
"""Files that were found sound, with the state that they were found in: a start looks at one folder several times."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Look at every file that a run reads; without ``weights`` at configuration and tokenizer alone.

    Not into tokenizer.json, which is large and read whole when it is loaded: see ``check_tokenizer``.

    Raises:
        ModelError: it names the file and what is wrong with it.
    """
    if _lies_there(folder / ADAPTER):
        raise ModelError(
            f"{folder} holds a PEFT adapter ({ADAPTER}), which transformers would put into the base where peft is"
            " installed, and leave out elsewhere",
            key="model_name",
            hint="give the base itself, or a folder into which the adapter was merged",
        )
    found = {name: folder / name for name in JSON_FILES if _lies_there(folder / name)}
    for path in found.values():
        _once(path, _json_object)
    if _lies_there(folder / TOKENIZER) and not (folder / TOKENIZER).is_file():
        check_tokenizer(folder)
    if _lies_there(folder / TOKENIZER) and "tokenizer_config.json" not in found:
        raise _wrong(
            folder / "tokenizer_config.json", "is not there: the tokens that begin and end a text would be unknown"
        )
    if _lies_there(folder / TEMPLATE):
        _once(folder / TEMPLATE, _check_template)
    if not weights:
        return
    quantized = is_quantized(folder)
    single = folder / SINGLE
    if _lies_there(single):
        _check_header(single, quantized=quantized)
    elif _lies_there(folder / INDEX):
        _check_shards(folder, _json_object(folder / INDEX), quantized=quantized)


def is_quantized(folder: Path) -> bool:
    """Whether config.json says that the folder's weights are quantized already."""
    path = folder / "config.json"
    return _lies_there(path) and "quantization_config" in _json_object(path)


def refuse_not_finite(model: torch.nn.Module, name: str, known: Iterable[str] = ()) -> None:
    """One pass over the weights, where they are: a NaN would make every number of a run NaN.

    ``known`` are tensors that were found so before they were quantized.

    Raises:
        ModelError: it names the first tensor.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = (key for key, tensor in tensors if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor))
    # an int8 weight's scales are infinite where it was
    wrong = list(dict.fromkeys(key.removesuffix(SCALES) for key in (*known, *found)))
    if wrong:
        raise ModelError(
            f"{name}: {len(wrong)} tensors hold NaN or infinity, {wrong[0]} first",
            key="model_name",
            hint=f"the weights are damaged: {HINT}; fp16 weights may also have overflowed",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """A sum is finite only if all of its parts are; where it overflows, every part is looked at.

    Piece by piece, because the sum of a fp16 tensor is taken of its fp32 copy: of a large embedding that is twice its
    size, and the most that loading a model needs. bf16 has fp32's range and needs no copy, which halves the time.
    """
    with torch.no_grad():
        dtype = tensor.dtype if tensor.dtype in (torch.float64, torch.bfloat16) else torch.float32
        rows = max(1, PIECE_NUMBERS * len(tensor) // tensor.numel()) if tensor.ndim else 1
        for piece in tensor.split(rows) if tensor.ndim else (tensor,):
            if not torch.isfinite(piece.sum(dtype=dtype)) and not torch.isfinite(piece).all():
                return False
        return True


def check_tokenizer(folder: Path) -> None:
    """Say what is wrong with a tokenizer.json that could not be loaded, if it is the file itself.

    Raises:
        ModelError: it cannot be read, or is not a JSON object.
    """
    if _lies_there(folder / TOKENIZER):
        _json_object(folder / TOKENIZER)


def refuse_ids_beyond(rows: int, tokenizer: Any, *, highest: int | None, name: str) -> str | None:
    """Refuse token ids that the embedding, of ``rows`` rows, has no row for.

    Args:
        highest: the highest id of the data; None when there is none yet.

    Returns:
        A warning where the tokenizer knows such ids and the data does not use them; some models are made so.

    Raises:
        ModelError: the data or the tokenizer's own special tokens use one.
    """
    if len(tokenizer) <= rows and _has_no_gaps(tokenizer):
        return None
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values(), default=-1) < rows:
        return None
    used = {
        "end-of-text": tokenizer.eos_token_id,
        "begin-of-text": tokenizer.bos_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for what, token in used.items():
        if token is not None and token >= rows:
            raise _beyond(name, f"the {what} token has the id {token}", rows)
    if highest is not None and highest >= rows:
        token = next((text for text, index in vocabulary.items() if index == highest), "")
        raise _beyond(name, f"a row of the data holds the id {highest} ({token!r})", rows)
    beyond = sum(index >= rows for index in vocabulary.values())
    return f"the tokenizer knows {beyond} tokens that the model's embedding of {rows:,} rows does not hold"


def _has_no_gaps(tokenizer: Any) -> bool:
    """Whether the ids are 0 to ``len(tokenizer) - 1``: as many tokens as ids that have one.

    Half the time of a dictionary of the whole vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and None not in map(backend.id_to_token, range(len(tokenizer)))


def _beyond(name: str, what: str, rows: int) -> ModelError:
    return ModelError(
        f"{name}: tokenizer and model do not belong together: {what}, and the embedding has {rows:,} rows",
        key="model_name",
        hint="take tokenizer and model from one place, or rows without this token",
    )


def _lies_there(path: Path) -> bool:
    """Whether anything has this name, be it a dead link."""
    return path.exists() or path.is_symlink()


def _once(path: Path, check: Callable[[Path], object]) -> None:
    """Make a check of a file's content unless this process made it before and the file is the same since."""
    try:
        known = (path, *file_state(path))
    except OSError:
        known = ()  # a dead link: the check says so
    if known not in _SOUND:
        check(path)
        _SOUND.add(known)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _wrong(path, "is not UTF-8") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except RecursionError as error:
        raise _wrong(path, "is nested too deeply") from error
    except ValueError as error:
        raise _wrong(path, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _wrong(path, "is not a JSON object")
    return value


def _check_template(path: Path) -> None:
    import jinja2

    text = _text(path)
    try:
        # transformers' own tag marks what is trained; jinja itself does not know it
        jinja2.Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except (jinja2.TemplateError, RecursionError) as error:
        raise _wrong(path, f"is no chat template: {error}") from error
    if "messages" not in text:
        raise _wrong(path, "is no chat template: it never looks at the messages")


def _check_header(path: Path, *, quantized: bool) -> set[str]:
    """The names of the tensors; the file is as long as its header says, and its weights are numbers to train on."""
    header = dict(_header(path))
    if not quantized:
        for name, (dtype, _) in header.items():
            if dtype not in FLOATS and name.endswith((".weight", ".bias")):
                raise _wrong(path, f"holds {name} as {dtype}, and config.json declares no quantization")
    return set(header)


def _header(path: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """(name, (dtype, shape)) of each tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise _wrong(path, "is damaged: it does not begin with a header of safetensors")
            facts = json.loads(file.read(length).decode("utf-8"))
        ends = [8 + length]
        for name, entry in facts.items():
            if name != "__metadata__":
                ends.append(8 + length + int(entry["data_offsets"][1]))
                yield name, (str(entry["dtype"]), list(entry["shape"]))
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _wrong(path, f"is damaged: its header cannot be read ({type(error).__name__})") from error
    if max(ends) != size:
        raise _wrong(path, f"is damaged: it has {size:,} bytes, its header speaks of {max(ends):,}")


def most_common(counts: Mapping[torch.dtype, int]) -> torch.dtype:
    """The precision of most numbers of :func:`dtypes_of`; fp32 where there are none."""
    return max(counts, key=counts.__getitem__, default=torch.float32)


def dtypes_of(folder: Path) -> dict[torch.dtype, int]:
    """Numbers in a model folder's safetensors, by the floating-point precision that their headers say.

    Raises:
        ModelError: a header cannot be read.
    """
    single = folder / SINGLE
    index = {} if _lies_there(single) or not _lies_there(folder / INDEX) else _json_object(folder / INDEX)
    files = sorted({str(file) for file in index.get("weight_map", {}).values()}) or [SINGLE]
    found: dict[torch.dtype, int] = {}
    for file in files:
        for _, (name, shape) in _header(folder / file):
            if name in FLOATS:
                found[FLOATS[name]] = found.get(FLOATS[name], 0) + math.prod(shape)
    return found


def _check_shards(folder: Path, index: Mapping[str, Any], *, quantized: bool) -> None:
    path = folder / INDEX
    homes = index.get("weight_map")
    if not isinstance(homes, dict) or not homes or not all(isinstance(file, str) for file in homes.values()):
        raise _wrong(path, "has no weight_map of tensor names to files")
    for file in sorted(set(homes.values())):
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise _wrong(path, f"names {file!r}, which does not lie beside it")
        if not (folder / file).is_file():
            raise _wrong(path, f"names {file}, which is not there")
        if not file.endswith(".safetensors"):
            raise _wrong(path, f"names {file}, which is no safetensors file")
        held = _check_header(folder / file, quantized=quantized)
        if missing := sorted(name for name, home in homes.items() if home == file and name not in held):
            raise _wrong(folder / file, f"does not hold {missing[0]}, which {INDEX} promises")


def _wrong(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} {what}", key="model_name", hint=HINT)
