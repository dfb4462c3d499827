"""Content hashes of large files, remembered from one run to the next.

Notable: a hash is believed only while device, inode, size and both times of the file are those that it was computed
under; every write changes the second time (ctime), which no program can set. What was changed within the last two
seconds is not remembered. What this cannot see is a disk that gives other bytes than were written: who needs to know
deletes the cache's ``hashes``; ``export``, ``merge`` and ``replay`` read the base weights again.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from eulerforge.config.atomic import file_state, sha256_of, write_json_atomic
from eulerforge.config.cachedir import cache_root

LARGE = 8 << 20
"""Bytes; a smaller file is hashed sooner than its hash is looked up."""


def known_sha256(path: Path) -> tuple[str, bool]:
    """The content hash of a file in hexadecimal, and whether it was remembered.

    A cache that cannot be read or written costs time and nothing else.

    Raises:
        OSError: the file cannot be read.
    """
    before = file_state(path)
    if path.stat().st_size < LARGE:
        return sha256_of(path), False
    place = cache_root() / "hashes" / f"{hashlib.sha256(bytes(path.resolve())).hexdigest()[:32]}.json"
    if (known := _remembered(place, before)) is not None:
        return known, True
    found = sha256_of(path)
    if file_state(path) == before:
        with suppress(OSError):
            write_json_atomic(place, {"path": str(path), "state": list(before), "sha256": found})
    return found, False


def _remembered(place: Path, state: tuple[int, ...]) -> str | None:
    try:
        entry = json.loads(place.read_bytes())
        known = entry["sha256"]
        return known if entry["state"] == list(state) and isinstance(known, str) and len(known) == 64 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
