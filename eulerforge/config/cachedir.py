"""Where things are kept that can be made again: tokenized data and converted weights."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$EULERFORGE_CACHE``, else ``$XDG_CACHE_HOME/eulerforge``, else ``~/.cache/eulerforge``."""
    if own := os.environ.get("EULERFORGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eulerforge"
