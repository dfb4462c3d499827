"""The tensor files of a base folder: which file holds which tensor, and what a copy of the folder takes along.

A copy takes the safetensors that transformers would load and every file that is no weight file.
Pickle files are never copied, and neither are weights in a second format (``consolidated.safetensors``, GGUF, ONNX):
they would still hold the old values beside the merged ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError, safe_open

from eulerforge.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_FORMATS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".npy", ".ot")

PREFIXES: tuple[tuple[str, str], ...] = (
    ("", ""),
    # a text model that transformers took out of a multimodal checkpoint
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.language_model.", "language_model.model."),
    # a checkpoint of the decoder without its head
    ("model.", ""),
)
"""Live prefix and the prefix in the files, in the order in which they are tried."""


@attrs.frozen(kw_only=True)
class BaseFiles:
    """The safetensors of ``folder``: ``shards`` maps a tensor's name to the file that holds it, relative to it.

    ``index`` is the content of the index file, None for a folder with one file.
    """

    folder: Path
    shards: Mapping[str, str]
    index: Mapping[str, Any] | None

    @property
    def files(self) -> tuple[str, ...]:
        """The shards' file names, each once, sorted."""
        return tuple(sorted(set(self.shards.values())))

    def name_of(self, live: str) -> str:
        """The name in the files of a parameter of the live model.

        Raises:
            ModelError: no file holds the tensor.
        """
        for candidate in candidates(live):
            if candidate in self.shards:
                return candidate
        tied = live == "lm_head.weight"
        raise ModelError(
            f"{self.folder.name} holds no tensor for {live}, which training changed",
            hint="the output head is tied to the embedding: it cannot be changed alone"
            if tied
            else f"the files hold names such as {', '.join(sorted(self.shards)[:3])}",
        )


def candidates(live: str) -> Iterator[str]:
    """The names that a parameter of the live model may have in the files, the likeliest first."""
    seen = set()
    for live_prefix, file_prefix in PREFIXES:
        if live.startswith(live_prefix):
            name = file_prefix + live[len(live_prefix) :]
            if name not in seen:
                seen.add(name)
                yield name


def read_base_files(folder: Path) -> BaseFiles:
    """Look into a base folder's safetensors; only headers are read.

    Raises:
        ModelError: there are none, or they are damaged, or the index names files that are not there.
    """
    single, index_file = folder / SINGLE, folder / INDEX
    if single.is_file():
        return BaseFiles(folder=folder, shards=dict.fromkeys(_names_in(single), SINGLE), index=None)
    if not index_file.is_file():
        raise _no_safetensors(folder)
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        shards = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{index_file} is no index of safetensors: {error}", hint="get the base model again"
        ) from error
    files = set(shards.values())
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise ModelError(
            f"{index_file} names {outside[0]}, which does not lie beside it", hint="get the base model again"
        )
    for file in sorted(files):
        if not (folder / file).is_file():
            raise ModelError(f"{index_file} names {file}, which is not there", hint="get the base model again")
        expected = {name for name, home in shards.items() if home == file}
        if missing := sorted(expected - set(_names_in(folder / file))):
            raise ModelError(f"{folder / file} does not hold {missing[0]}", hint="get the base model again")
    return BaseFiles(folder=folder, shards=shards, index=index)


def other_files(folder: Path) -> Iterable[Path]:
    """Relative paths of all that belongs into a copy beside the weights: configuration, tokenizer, code, licence."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        index = relative.name.endswith(".index.json")
        if (
            path.is_file()
            and not hidden
            and not index
            and relative.suffix.lower() not in PICKLE_SUFFIXES + OTHER_FORMATS
        ):
            yield relative


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="get the base model again") from error


def _no_safetensors(folder: Path) -> ModelError:
    pickled = any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()) if folder.is_dir() else False
    return ModelError(
        f"{folder} has no {SINGLE} and no {INDEX}",
        hint="its weights are pickle files, which can run code and are never copied: convert them to safetensors first"
        if pickled
        else "the base model's folder has moved or is incomplete",
    )
