"""The base weights' hash, remembered or computed beside the loading: hashing reads the same files and holds no
interpreter lock.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from eulerforge.config.knownhash import known_sha256
from eulerforge.training.receipt import base_weights


class BaseHash:
    """``begin`` it as soon as the folder is known, ask for the ``result`` when it is needed.

    The thread ends with the process: a run that is refused meanwhile does not wait for it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._found: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._hashed: list[str] = []

    def begin(self, folder: Path) -> None:
        self._thread = threading.Thread(target=self._hash, args=(folder,), name="base-hash", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether whoever asks for the result now will have to wait."""
        return self._thread is None or self._thread.is_alive()

    def result(self, folder: Path) -> dict[str, Any]:
        """What :func:`base_weights` gives for the folder; computed now where nobody began it.

        Raises:
            OSError, ValueError: what it raises.
        """
        if self._thread is None:
            self.begin(folder)
        assert self._thread is not None  # noqa: S101 - begun above
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def line(self) -> str:
        """What a run says once it has the result."""
        files = self._found["files"]
        known = len(files) - len(self._hashed)
        how = "computed" if not known else f"remembered for {known} of {len(files)} files, unchanged since"
        return f"base weights: sha256 {self._found['sha256'][:12]}, {how}"

    def _hash(self, folder: Path) -> None:
        try:
            self._found = base_weights(folder, hash_of=self._hash_of)
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error

    def _hash_of(self, path: Path) -> str:
        found, remembered = known_sha256(path)
        if not remembered:
            self._hashed.append(path.name)
        return found
