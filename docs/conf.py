"""Sphinx settings; the command line and preset references are written from the code before every build."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

from eulerforge import __version__

project = "EulerForge"
author = "The EulerForge engineers"
copyright = "2026, the EulerForge engineers"
release = version = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"EulerForge {__version__}"
exclude_patterns = ["_build"]
nitpicky = False

generate.write_all(Path(__file__).parent / "reference" / "generated")
