"""Write the parts of the documentation that come from the code itself.

    python docs/generate.py [--output docs/_generated]

configuration.md from the configuration models, parallelism.md from the rules that refuse a layout,
megatron.md from the compatibility guard, arguments.md from the parser of pretrain_gpt.py, commands.md from
the parser of the command line, measurements.md and the techniques' tables and figures from docs/results/data.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lgreco_results
import mkor_results
import random_ltd_results
import rmm_results
import slope_results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "launch"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def configuration() -> str:
    """Return every section with its keys, without the page's own heading."""
    from ds_efficient.config.reference import render_reference

    return render_reference().split("\n", 1)[1]


def parallelism() -> str:
    """Return the table of combinations."""
    from ds_efficient.core.parallelism import table

    return table()


def megatron() -> str:
    """Return the tested versions of megatron-core and what is checked at start-up."""
    from megatron_patches.version_guard import SEAMS, TESTED_VERSIONS

    lines = [
        f"Tested: megatron-core {' and '.join(TESTED_VERSIONS)}.",
        "",
        "| used of megatron-core | parameters that must exist | for |",
        "| --- | --- | --- |",
    ]
    for seam in SEAMS:
        names = ", ".join(f"`{name}`" for name in seam.parameters) or "-"
        lines.append(f"| `{seam.where.replace(':', '.')}` | {names} | {_cell(seam.used_for)} |")
    return "\n".join(lines) + "\n"


def arguments() -> str:
    """Return the arguments of pretrain_gpt.py, one table a group."""
    from pretraining.arguments import build_parser

    lines: list[str] = []
    for group in build_parser()._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        lines += [f"### {str(group.title).capitalize()}", ""]
        lines += ["| argument | default | meaning |", "| --- | --- | --- |"]
        for action in actions:
            flag = f"`{action.option_strings[0]}`"
            if action.choices is not None:
                flag += " " + ", ".join(f"`{choice}`" for choice in action.choices)
            default = "" if action.default in (None, False) else f"`{action.default}`"
            lines.append(
                f"| {flag} | {'required' if action.required else default} | {_cell(action.help or '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """Return the help text of every sub-command."""
    from ds_efficient.cli import COMMANDS, build_parser

    parser = build_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines: list[str] = []
    for name in COMMANDS:
        sub = subparsers.choices[name]
        sub.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
        lines += [f"## `ds_efficient {name}`", "", "```text", sub.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def measurements() -> str:
    """Return the training steps measured on GPUs, from the files in docs/results/data."""
    lines = [
        "| case | GPU | GPUs | micro-batch | tokens/s | TFLOP/s a GPU | MFU | peak memory | ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    versions = set()
    for path in sorted((ROOT / "docs" / "results" / "data").glob("training_step_*.csv")):
        with open(path, newline="") as stream:
            for row in csv.DictReader(stream):
                lines.append(
                    f"| {row['case']} | {row['gpu']} | {row['gpus']} | {row['micro_batch']} | "
                    f"{float(row['tokens_per_second']):,.0f} | {float(row['model_tflops']):.0f} | "
                    f"{100 * float(row['mfu']):.1f}% | {float(row['peak_memory']) / 2**30:.1f} GiB | "
                    f"{float(row['ms_per_step']):.1f} |"
                )
                names = ("python", "torch", "cuda", "deepspeed", "megatron-core")
                versions.add(", ".join(f"{name} {row[name]}" for name in names))
    return "\n".join([*lines, "", *(f"Versions: {text}." for text in sorted(versions))]) + "\n"


PARTS: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "parallelism.md": parallelism,
    "megatron.md": megatron,
    "arguments.md": arguments,
    "commands.md": commands,
    "measurements.md": measurements,
    "slope_steps.md": slope_results.steps,
    "slope_kernels.md": slope_results.kernels,
    "slope_products.md": slope_results.products,
    "slope_adapters.md": slope_results.adapters,
    "slope_layers.md": slope_results.layers,
    "slope_cpu.md": slope_results.on_the_cpu,
    "slope_quality.md": slope_results.quality,
    "slope_learning_rates.md": slope_results.learning_rates,
    "rmm_layers.md": rmm_results.layers,
    "rmm_memory.md": rmm_results.memory,
    "rmm_kernels.md": rmm_results.kernels,
    "rmm_tried.md": rmm_results.tried,
    "rmm_quality.md": rmm_results.quality,
    **mkor_results.PARTS,
    "random_ltd_schedules.md": random_ltd_results.schedules,
    "random_ltd_steps.md": random_ltd_results.steps,
    "random_ltd_kernels.md": random_ltd_results.kernels,
    "random_ltd_quality.md": random_ltd_results.quality,
    **lgreco_results.PARTS,
}


def write_all(folder: Path) -> list[Path]:
    """Write every part into `folder`; a file whose text has not changed keeps its time."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, render in PARTS.items():
        path, text = folder / name, render()
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        written.append(path)
    modules = (slope_results, rmm_results, mkor_results, random_ltd_results, lgreco_results)
    drawn = [module.figures(folder) for module in modules]
    return [*written, *(path for paths in drawn for path in paths)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the documentation.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "_generated", metavar="DIR")
    for path in write_all(parser.parse_args(argv).output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
