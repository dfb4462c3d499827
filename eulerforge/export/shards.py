"""One safetensors file into another, tensor by tensor and piece by piece: never a whole shard in memory.

The library's own ``save_file`` wants every tensor of a file at once.
The format is simple enough to stream: the header's length (8 bytes, little-endian), the header (JSON: name, dtype,
shape, offsets), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TypeAlias

import attrs
import torch

from eulerforge.models.soundness import FLOATS

BLOCK = 4 * 2**20
"""Bytes that are read, changed and written at a time."""
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in FLOATS.items()}

Change: TypeAlias = Callable[[torch.Tensor, int, int], torch.Tensor]
"""From a tensor's rows (fp32), the first row's index and the one after the last, to the new rows (fp32)."""


@attrs.frozen(kw_only=True)
class Entry:
    """A tensor of a file: ``dtype`` as safetensors spells it, ``start`` and ``end`` in bytes from the file's begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_float(self) -> bool:
        return self.dtype.lstrip("B").startswith("F")


@attrs.frozen(kw_only=True)
class Rewrite:
    """What becomes of one tensor: ``change`` None only casts; ``whole``: the change wants all rows at once."""

    dtype: torch.dtype
    change: Change | None = None
    whole: bool = False


def read_header(path: Path) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """The tensors of a file and its metadata."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = []
    for name, value in header.items():
        start, end = value["data_offsets"]
        entries.append(
            Entry(
                name=name,
                dtype=value["dtype"],
                shape=tuple(value["shape"]),
                start=8 + length + start,
                end=8 + length + end,
            )
        )
    return tuple(entries), metadata


def write_shard(
    source: Path, out: Path, rewrites: Mapping[str, Rewrite], check: Callable[[str, torch.Tensor], None]
) -> int:
    """Copy a file with some tensors rewritten; give back the bytes of its tensors.

    ``check`` sees the name and each new piece in its final dtype, before it is written.
    """
    entries, metadata = read_header(source)
    planned = [(entry, _size(entry, rewrites.get(entry.name))) for entry in entries]
    # as the library orders them: the widest elements first, so that every tensor is aligned
    planned.sort(key=lambda pair: (-_bits(_dtype(pair[0], rewrites.get(pair[0].name))), pair[0].name))
    header: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    offset = 0
    for entry, size in planned:
        dtype = _dtype(entry, rewrites.get(entry.name))
        header[entry.name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reader, out.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for entry, _ in planned:
            rewrite = rewrites.get(entry.name)
            for piece in _copied(reader, entry) if rewrite is None else _rewritten(reader, entry, rewrite, check):
                writer.write(piece)
    return offset


def _dtype(entry: Entry, rewrite: Rewrite | None) -> str:
    return entry.dtype if rewrite is None else NAMES[rewrite.dtype]


def _bits(dtype: str) -> int:
    """The width of an element: ``BF16`` has 16 bits, ``F8_E4M3`` 8, ``BOOL`` 8."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _size(entry: Entry, rewrite: Rewrite | None) -> int:
    return entry.end - entry.start if rewrite is None else math.prod(entry.shape) * rewrite.dtype.itemsize


def _copied(reader: IO[bytes], entry: Entry) -> Iterator[bytes]:
    for start in range(entry.start, entry.end, BLOCK):
        reader.seek(start)
        yield reader.read(min(BLOCK, entry.end - start))


def _rewritten(
    reader: IO[bytes], entry: Entry, rewrite: Rewrite, check: Callable[[str, torch.Tensor], None]
) -> Iterator[memoryview]:
    if entry.start == entry.end:
        return
    dtype = FLOATS[entry.dtype]
    rows = entry.shape[0] if entry.shape else 1
    row = (entry.end - entry.start) // rows
    step = rows if rewrite.whole else max(1, BLOCK // row)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        reader.seek(entry.start + first * row)
        buffer = bytearray((last - first) * row)
        reader.readinto(buffer)  # type: ignore[attr-defined]
        data = torch.frombuffer(buffer, dtype=dtype)
        part = data.view(last - first, *entry.shape[1:]) if entry.shape else data.view(())
        new = (part if rewrite.change is None else rewrite.change(part.float(), first, last)).to(rewrite.dtype)
        check(entry.name, new)
        yield new.contiguous().view(-1).view(torch.uint8).numpy().data
