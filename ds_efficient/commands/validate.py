"""``ds_efficient validate``: check configurations and report everything that is wrong with them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ds_efficient.config.efficiency import EfficiencyConfig, check_config
from ds_efficient.errors import USER_ERROR_EXIT, ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "validate",
        help="check DeepSpeed JSON files",
        description="Check DeepSpeed JSON files with this package's sections; report every problem at once.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="DeepSpeed JSON file")
    parser.add_argument(
        "--show-defaults",
        action="store_true",
        help="print this package's sections as JSON with every default filled in",
    )
    parser.add_argument(
        "--world-size", type=_ranks, metavar="N", help="data-parallel ranks, to check the batch sizes against"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check every file; return 2 if any has a problem."""
    failed = False
    for name in args.files:
        try:
            config, problems, warnings, source = check_config(name, world_size=args.world_size)
        except ConfigError as error:
            config, problems, warnings, source = None, error.problems, [], error.source
        for warning in warnings:
            print(f"{source}: warning: {warning}", file=sys.stderr)
        if config is None:
            failed = True
            print(ConfigError(source, problems), file=sys.stderr)
            continue
        # With --show-defaults standard output is JSON and nothing else.
        print(_summary(config), file=sys.stderr if args.show_defaults else sys.stdout)
        if args.show_defaults:
            print(json.dumps(config.resolved(), indent=2))
    return USER_ERROR_EXIT if failed else 0


def _summary(config: EfficiencyConfig) -> str:
    names = ", ".join(row.name for row in config.enabled()) or "no technique"
    return f"{config.source}: valid; {names} enabled; {config.precision}, ZeRO stage {config.zero_stage}"


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected an integer >= 1")
    return int(text)
