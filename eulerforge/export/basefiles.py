"""The tensor files of a base folder: which file holds which tensor, and what a copy of the folder takes along.

A copy takes the safetensors that transformers would load and every file that is no weight file.
Pickle files are never copied, and neither are weights in a second format (``consolidated.safetensors``, GGUF, ONNX):
they would still hold the old values beside the merged ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError, safe_open

from eulerforge.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_FORMATS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".npy", ".ot")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""What transformers' tokenizers are read from, their chat templates included."""

SHARED_BLOBS = ".huggingface-shared-blobs"
"""The file that marks the hub cache's blobs that several models share."""

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

FILE_MODULES: tuple[tuple[str, str], ...] = ((".mlp.", ".mlp."), (".mlp.", ".block_sparse_moe."))
"""Live module and the module in the files: Mixtral's checkpoints have a name of their own for the mixture."""

EXPERT_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "experts.gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "experts.down_proj": (("down_proj",), ("w2",)),
}
"""A fused parameter, and the names of its parts where the files hold each expert by itself: equal parts of its rows, in
their order, as Qwen's and as Mixtral's checkpoints call them."""


@attrs.frozen(kw_only=True)
class Piece:
    """A tensor of the files and the part of a live parameter that it is: all of it, or rows of one expert."""

    name: str
    expert: int | None = None
    first_row: int = 0
    rows: int = 0

    def index(self, start: int, end: int) -> tuple[slice, ...]:
        """Where the file's rows ``start`` to ``end`` lie in the live parameter."""
        if self.expert is None:
            return (slice(start, end),)
        return slice(self.expert, self.expert + 1), slice(self.first_row + start, self.first_row + end)

    def shape(self, live: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor, for the live parameter's."""
        return live if self.expert is None else (self.rows, *live[2:])


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
        """The name in the files of a parameter of the live model that one tensor holds.

        Raises:
            ModelError: no file holds the tensor, or several hold parts of it.
        """
        if (found := self._found(live)) is None:
            raise self._missing(live)
        return found

    def pieces_of(self, live: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """The tensors of the files that hold a parameter of the live model, of that shape.

        Raises:
            ModelError: no file holds it, or the files hold only some of its experts, or more than it has.
        """
        if (whole := self._found(live)) is not None:
            return (Piece(name=whole),)
        for stem, parts in _expert_names(live):
            if f"{stem}.0.{parts[0]}.weight" not in self.shards:
                continue
            rows = shape[1] // len(parts)
            pieces = tuple(
                Piece(name=f"{stem}.{expert}.{part}.weight", expert=expert, first_row=number * rows, rows=rows)
                for expert in range(shape[0])
                for number, part in enumerate(parts)
            )
            lost = [piece.name for piece in pieces if piece.name not in self.shards]
            if lost or f"{stem}.{shape[0]}.{parts[0]}.weight" in self.shards:
                raise ModelError(
                    f"{self.folder.name} holds other experts for {live} than the {shape[0]} of the model",
                    hint=f"{lost[0]} is not there" if lost else "the base model's config.json does not fit its files",
                )
            return pieces
        raise self._missing(live)

    def _found(self, live: str) -> str | None:
        return next((candidate for candidate in candidates(live) if candidate in self.shards), None)

    def _missing(self, live: str) -> ModelError:
        tied = live == "lm_head.weight"
        return ModelError(
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
            for module, file_module in FILE_MODULES:
                name = file_prefix + live[len(live_prefix) :].replace(module, file_module)
                if name not in seen:
                    seen.add(name)
                    yield name


def _expert_names(live: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For a fused parameter, every module in the files that may hold its experts, and what its parts may be called."""
    for candidate in candidates(live):
        for suffix, layouts in EXPERT_PARTS.items():
            if candidate.endswith(f".{suffix}"):
                for parts in layouts:
                    yield candidate.rpartition(".")[0], parts


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


def other_files(folder: Path, only: Collection[str] = ()) -> Iterable[Path]:
    """Relative paths of all that belongs into a copy beside the weights: configuration, tokenizer, code, licence.

    With ``only``, those of the files and subfolders with these names.

    Raises:
        ModelError: one of them is a link to a file elsewhere, which would be published with the copy.
    """
    # in the hub's cache every file is a link to the blobs beside the snapshots, and of large ones there a link to the
    # blobs that all of its models share (huggingface_hub 2)
    repository = folder.resolve().parent.parent
    homes = [folder.resolve(), repository / "blobs"]
    if repository.name.startswith("models--") and (repository.parent / "blobs" / SHARED_BLOBS).is_file():
        homes.append(repository.parent / "blobs")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        index = relative.name.endswith(".index.json")
        if (
            path.is_file()
            and not hidden
            and not index
            and (not only or relative.parts[0] in only)
            and relative.suffix.lower() not in PICKLE_SUFFIXES + OTHER_FORMATS
        ):
            if not any(path.resolve().is_relative_to(home) for home in homes):
                raise ModelError(
                    f"{path} is a link that leads out of the base's folder: a copy of it would be published",
                    hint="put the file itself there, if you know what it is, or delete the link",
                )
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
