"""``ds_efficient report``: table, figures and CSV of one or several runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "report",
        help="table, figures and CSV of runs",
        description="Read the run.jsonl of one or several runs and write report.md, loss.png, throughput.png "
        "and one CSV a run.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its run.jsonl")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the report (RUN/report; ./report for several runs)"
    )
    parser.add_argument("--no-figures", action="store_true", help="write no PNG; needs no matplotlib")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report, print its table and the files' names."""
    from ds_efficient.core.plan_text import align
    from ds_efficient.report.tables import result_rows
    from ds_efficient.report.write import write_report

    runs, names, written = write_report(args.runs, args.output, figures=not args.no_figures)
    print("\n".join(align([["", *names], *result_rows(runs, names)])))
    for one, name in zip(runs, names, strict=True):
        for note in one.notes:
            print(f"note: {name}: {note}")
    print()
    for path in written:
        print(f"wrote {path}")
    return 0
