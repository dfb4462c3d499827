"""Tokenized rows kept in a folder named by everything they depend on.

Notable: an entry appears whole or not at all (staged beside it, fsynced, one rename), and is believed only when every
file has the size and hash that its manifest says. A damaged entry is said and made again. Nothing is unpickled.
Rows are written chunk by chunk and read as memory maps, so that a million of them need no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from eulerforge.config.atomic import sha256_of, staged_folder
from eulerforge.data.tokenized import ARRAYS, RowChunk, TokenizedRows

_MANIFEST = "entry.json"
_VERSION = 10


@attrs.frozen(kw_only=True)
class CacheEntry:
    """A place in the cache. ``key`` is what :func:`cache_key` gave."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / self.key

    def load(self, files: tuple[str, ...], *, verify: bool = True) -> tuple[TokenizedRows, dict[str, Any]] | str | None:
        """(rows, facts); None when there is no entry; a sentence that says what is damaged.

        Without ``verify`` the content is not hashed: right after it was written.
        """
        if not self.path.is_dir():
            return None
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text("utf-8"))
            arrays = {}
            for name, dtype in ARRAYS.items():
                path, stated = self.path / f"{name}.npy", manifest["files"][name]
                if path.stat().st_size != stated["size"] or (verify and sha256_of(path) != stated["sha256"]):
                    return f"{path} is damaged"
                arrays[name] = np.load(path, mmap_mode="r" if stated["items"] else None, allow_pickle=False)
                if arrays[name].dtype != dtype:
                    return f"{path} has another type of numbers than expected"
            facts = manifest["facts"]
            if not isinstance(facts, dict):
                return f"{self.path / _MANIFEST} is damaged"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{self.path} is damaged ({error})"
        return TokenizedRows(files=files, **arrays), facts

    def build(self, fill: Callable[[EntryWriter], Mapping[str, Any]]) -> None:
        """Make the entry, in place of a damaged one if there is one: ``fill`` adds the chunks and gives back the facts.

        Raises:
            OSError: it cannot be written; nothing is left behind then, nor when ``fill`` raises.
        """
        with staged_folder(self.path, replace=True) as staged:
            with EntryWriter(staged) as writer:
                facts = fill(writer)
            files = {}
            for name, items in writer.items.items():
                path = staged / f"{name}.npy"
                files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path), "items": items}
            manifest = {"version": _VERSION, "files": files, "facts": dict(facts)}
            (staged / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class EntryWriter:
    """Appends chunks to the arrays' files; their headers, of fixed length, are set right at the end."""

    def __init__(self, folder: Path) -> None:
        self.items = dict.fromkeys(ARRAYS, 0)
        self._position = 0
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context((folder / f"{name}.npy").open("wb")) for name in ARRAYS}
        for name in ARRAYS:
            self._files[name].write(_npy_header(name, 0))
        self._append("offsets", np.zeros(1, np.int64))

    def add(self, chunk: RowChunk) -> None:
        for name, array in chunk.arrays().items():
            if name == "offsets":
                ends = self._position + np.cumsum(array, dtype=np.int64)
                self._position = int(ends[-1]) if len(ends) else self._position
                self._append(name, ends)
            else:
                self._append(name, array)

    def _append(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._files[name].write(np.ascontiguousarray(array, dtype=ARRAYS[name]).data)
        self.items[name] += array.size

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                for name, file in self._files.items():
                    file.seek(0)
                    file.write(_npy_header(name, self.items[name]))


_HEADER_BYTES = 128


def _npy_header(name: str, items: int) -> bytes:
    """The header of a .npy file, always of the same length."""
    shape = (items // 2, 2) if name == "origins" else (items,)
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(ARRAYS[name])), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    header = stream.getvalue()
    if len(header) != _HEADER_BYTES:
        raise ValueError(f"a .npy header of {len(header)} bytes")
    return header


def cache_key(facts: Mapping[str, Any]) -> str:
    """The entry's name: a hash of all that the tokenized rows depend on."""
    text = json.dumps({"version": _VERSION, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what the tokenizer does to text: its serialized form, its chat template and its special tokens."""
    parts = {
        "tokenizer": hashlib.sha256(_serialized(tokenizer.backend_tokenizer).encode("utf-8")).hexdigest(),
        "template": tokenizer.chat_template,
        "bos": str(tokenizer.bos_token),
        "eos": str(tokenizer.eos_token),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _serialized(backend: Any) -> str:
    """The tokenizer's JSON without truncation and padding.

    Earlier calls leave both behind, and neither has a part in what we ask of it. They are taken off and put back,
    because parsing a vocabulary and writing it again takes five times as long.
    """
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        text: str = backend.to_str()
        return text
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
