"""``ds_efficient schema``: print the JSON schema of the configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ds_efficient.config.schema import render_schema
from ds_efficient.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "schema",
        help="print the JSON schema of the configuration",
        description="Print the JSON schema (draft 2020-12) of a DeepSpeed file with this package's sections.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE, not to standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print or write the schema."""
    text = render_schema()
    if args.output is None:
        sys.stdout.write(text)
        return 0
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written: {error.strerror}") from None
    return 0
