"""Tokenized rows kept in a folder named by everything they depend on.

Notable: an entry appears whole or not at all (staged beside it, fsynced, one rename), and is believed only when every
file has the size and hash that its manifest says. A damaged entry is said and made again. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from eulerforge.config.atomic import sha256_of, staged_folder
from eulerforge.data.tokenized import ARRAYS, TokenizedRows

_MANIFEST = "entry.json"
_VERSION = 1


@attrs.frozen(kw_only=True)
class CacheEntry:
    """A place in the cache. ``key`` is what :func:`cache_key` gave."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / self.key

    def load(self, files: tuple[str, ...]) -> tuple[TokenizedRows, dict[str, Any]] | str | None:
        """(rows, facts); None when there is no entry; a sentence that says what is damaged."""
        if not self.path.is_dir():
            return None
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text("utf-8"))
            arrays = {}
            for name, dtype in ARRAYS.items():
                path, stated = self.path / f"{name}.npy", manifest["files"][name]
                if path.stat().st_size != stated["size"] or sha256_of(path) != stated["sha256"]:
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

    def store(self, rows: TokenizedRows, facts: Mapping[str, Any]) -> None:
        """Write the entry, in place of a damaged one if there is one. Raises OSError when it cannot be written."""
        with staged_folder(self.path, replace=True) as staged:
            files = {}
            for name in ARRAYS:
                path, array = staged / f"{name}.npy", getattr(rows, name)
                np.save(path, array, allow_pickle=False)
                files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path), "items": int(array.size)}
            manifest = {"version": _VERSION, "files": files, "facts": dict(facts)}
            (staged / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def cache_key(facts: Mapping[str, Any]) -> str:
    """The entry's name: a hash of all that the tokenized rows depend on."""
    text = json.dumps({"version": _VERSION, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what the tokenizer does to text: its serialized form, its chat template and its special tokens."""
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by earlier calls; neither has a part in what we ask of it.
    serialized["truncation"] = serialized["padding"] = None
    parts = {
        "tokenizer": serialized,
        "template": tokenizer.chat_template,
        "bos": str(tokenizer.bos_token),
        "eos": str(tokenizer.eos_token),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
