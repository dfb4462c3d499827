"""An import that raises."""

from __future__ import annotations

raise RuntimeError("the driver of this plugin is not there")
