"""The ``ds_efficient`` command: one sub-command a module of `ds_efficient.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ds_efficient.errors import USER_ERROR_EXIT, UserError
from ds_efficient.version import __version__

COMMANDS = ("validate", "plan", "env", "prebuild", "schema", "report", "export")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="ds_efficient", description="Check, plan, build for, report on and export GPT pretraining runs."
    )
    parser.add_argument("--version", action="version", version=f"ds_efficient {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"ds_efficient.commands.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (2 for users' mistakes)."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"ds_efficient {args.command}: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except BrokenPipeError:  # `ds_efficient plan | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
