"""Sphinx configuration. `docs/generate.py` writes the generated tables first; `tests/run.sh` does both."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import generate

from ds_efficient.version import __version__

generate.write_all(Path(__file__).resolve().parent / "_generated")

project = "ds_efficient"
author = "the ds_efficient developers"
copyright = "the ds_efficient developers, Apache-2.0"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_generated"]  # the generated parts are included by the pages
html_theme = "furo"
html_title = f"ds_efficient {__version__}"
nitpicky = True
