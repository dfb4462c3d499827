"""The base weights' hash, computed beside the loading: hashing reads the same files and holds no interpreter lock."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from eulerforge.training.receipt import base_weights


class BaseHash:
    """``begin`` it as soon as the folder is known, ask for the ``result`` when it is needed.

    The thread ends with the process: a run that is refused meanwhile does not wait for it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._found: dict[str, Any] = {}
        self._error: BaseException | None = None

    def begin(self, folder: Path) -> None:
        self._thread = threading.Thread(target=self._hash, args=(folder,), name="base-hash", daemon=True)
        self._thread.start()

    def result(self, folder: Path) -> dict[str, Any]:
        """What :func:`base_weights` gives for the folder; computed now where nobody began it.

        Raises:
            OSError, ValueError: what it raises.
        """
        if self._thread is None:
            return base_weights(folder)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _hash(self, folder: Path) -> None:
        try:
            self._found = base_weights(folder)
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error
