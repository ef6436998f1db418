"""Step time of ``launch/pretrain_gpt.py`` at several kept lengths, and the time a whole schedule saves.

    python tests/perf/random_ltd_steps.py [--models 354m 1.3b] [--passes 1 4] [--output docs/results/data]

Two runs on synthetic data for each model and number of micro-batches a step: one dense, and one with
random-LTD whose schedule stays for some steps at each of eleven lengths, from a sixteenth of the sequence to
all of it; the first interval at each length (warm-up of new shapes) is left out and the median of the others
is taken. The times, in straight lines between the lengths, are then added up over the paper's GPT schedule
(arXiv 2211.11586: full length after 70 % of the tokens, +16 tokens at a time) and compared with as many dense
steps.

Writes ``random_ltd_steps_<device name>.csv``: rows with the part ``dense``, ``step`` and ``schedule``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import DATA, ROOT, conditions, write_csv
from training_step import Case, command

sys.path.insert(0, str(ROOT))

from ds_efficient.core.shape import ModelShape
from ds_efficient.random_ltd.prediction import interpolated_step_cost, predict, relative_step_cost
from ds_efficient.random_ltd.schedule import TokenSchedule

CASES = {"354m": Case("354m", 8, True), "1.3b": Case("1.3b", 8, True), "tiny": Case("tiny", 2, False)}
SHAPES = {
    "354m": ModelShape(24, 1024, 16, 50304, 2048),
    "1.3b": ModelShape(24, 2048, 16, 50304, 2048),
    "tiny": ModelShape(2, 64, 4, 256, 64),
}
INCREASES = 10
STEPS_TO_FULL, STEPS = 200_000, 286_102  # of the paper: 300 billion tokens, 512 sequences of 2048 a step


def measured_schedule(shape: ModelShape, plateau: int, samples: int) -> TokenSchedule:
    """The schedule of the measured run: `plateau` steps at each length."""
    low = shape.seq_length // 16
    return TokenSchedule(
        low,
        shape.seq_length,
        INCREASES * plateau,
        (shape.seq_length - low) // INCREASES,
        total_layer_num=shape.num_layers,
        random_ltd_layer_num=dropping(shape),
        batch_size=samples,
    )


def dropping(shape: ModelShape) -> int:
    """Layers that drop tokens: all but the first and the last; in the trial's two layers the second."""
    return max(1, shape.num_layers - 2)


def papers_schedule(shape: ModelShape) -> TokenSchedule:
    """The paper's schedule for GPT, in the proportions of the sequence."""
    length = shape.seq_length
    return TokenSchedule(
        length // 16, length, STEPS_TO_FULL, max(1, length // 128),
        total_layer_num=shape.num_layers, random_ltd_layer_num=dropping(shape),
    )  # fmt: skip


def section(schedule: TokenSchedule) -> dict[str, Any]:
    """The JSON's sections for a schedule."""
    assert schedule.total_layer_num is not None
    ltd = {
        "enabled": True,
        "random_ltd_layer_id": list(range(1, 1 + schedule.dropping_layers)),
        "random_ltd_schedule": {
            "min_value": schedule.min_value,
            "max_value": schedule.max_value,
            "schedule_config": {
                "require_steps": schedule.require_steps,
                "seq_per_step": schedule.seq_per_step,
            },
        },
    }
    routing = {"enabled": True, "random_ltd": ltd}
    return {"data_efficiency": {"enabled": True, "data_routing": routing}}


def train(case: Case, steps: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the script; return the records of its run.jsonl.

    Raises:
        RuntimeError: it failed; with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = argparse.Namespace(**{**vars(arguments), "steps": steps})
        done = subprocess.run(
            command(case, folder, given), cwd=ROOT, capture_output=True, text=True, timeout=arguments.timeout
        )
        path = folder / "run.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        memory = [line for line in lines if "out of memory" in line.lower()]
        raise RuntimeError((memory or lines or ["no output"])[-1][:300])
    return records


def medians(records: list[dict[str, Any]], samples: int, length: int) -> dict[str, Any]:
    """Milliseconds a step, tokens/s and peak memory of some intervals."""
    speed = statistics.median(record["tokens_per_second"] for record in records)
    return {
        "milliseconds": 1000.0 * samples * length / speed,
        "tokens_per_second": speed,
        "peak_memory": max(record["peak_memory"] for record in records),
    }


def measure(model: str, passes: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model with so many micro-batches a step."""
    case, shape = CASES[model], SHAPES[model]
    case = dataclasses.replace(case, micro=arguments.micro_batch or case.micro)
    samples = case.micro * arguments.gpus * passes
    case = dataclasses.replace(case, arguments=f"--global-batch-size {samples}")
    measured = measured_schedule(shape, arguments.plateau, samples)
    records = train(case, 4 * arguments.interval, arguments)
    run = next(record for record in records if record["kind"] == "run")
    versions = {name: run["versions"][name] for name in ("deepspeed", "megatron-core")}
    head = {"model": model, "gpus": arguments.gpus, "micro_batch": case.micro, "passes": passes, **versions}
    trained = [record for record in records if record["kind"] == "train"][1:]
    dense = {**head, "part": "dense", "kept": shape.seq_length, **medians(trained, samples, shape.seq_length)}
    print(f"{model}, {passes} passes: dense step {dense['milliseconds']:.1f} ms", flush=True)

    changed = dataclasses.replace(case, sections=section(measured))
    records = train(changed, (INCREASES + 1) * arguments.plateau, arguments)
    trained = [record for record in records if record["kind"] == "train"]
    rows = [dense]
    for first, last, kept in measured.plateaus((INCREASES + 1) * arguments.plateau):
        assert last is not None
        steady = [r for r in trained if first + arguments.interval < r["step"] <= last]
        row = {**head, "part": "step", "kept": kept, **medians(steady, samples, shape.seq_length)}
        row["relative"] = row["milliseconds"] / dense["milliseconds"]
        row["layer_tokens"] = steady[-1]["layer_tokens"]
        row["expected_layer_tokens"] = measured.consumed_layer_tokens(last)
        rows.append(row)
        print(f"{model}: kept {kept:>5}: {row['milliseconds']:.1f} ms, {row['relative']:.3f}", flush=True)
    return [*rows, {**head, "part": "schedule", **saved(shape, rows)}]


def saved(shape: ModelShape, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the paper's schedule saves, by these steps and by their matrix products."""
    times = {row["kept"]: row["milliseconds"] for row in rows if row["part"] == "step"}
    schedule = papers_schedule(shape)
    found = predict(schedule, STEPS, interpolated_step_cost(times, rows[0]["milliseconds"]))
    products = predict(schedule, STEPS, relative_step_cost(schedule, shape))
    wrong = [
        r["kept"] for r in rows if r["part"] == "step" and r["layer_tokens"] != r["expected_layer_tokens"]
    ]
    if wrong:
        print(f"layer tokens of the run differ from the schedule's at kept lengths {wrong}", file=sys.stderr)
    print(
        f"{rows[0]['model']}: the paper's schedule saves {100 * found.time:.2f} % of the time, "
        f"{100 * found.share:.2f} % of the layer tokens, {100 * products.time:.2f} % of the matrix products",
        flush=True,
    )
    return {"time_saved": found.time, "layer_tokens_saved": found.share, "products_saved": products.time}


def main() -> int:
    """Run the models and write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=["354m", "1.3b"])
    parser.add_argument("--output", type=Path, default=DATA)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--passes", nargs="+", type=int, default=[1], help="micro-batches a step")
    parser.add_argument("--micro-batch", type=int, help="samples a micro-batch and GPU; default: the case's")
    parser.add_argument("--plateau", type=int, default=12, help="steps at each length")
    parser.add_argument(
        "--interval", type=int, default=4, help="steps between log lines; divides the plateau"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a run")
    parser.add_argument("--fp32", action="store_true", help="for a trial without a GPU")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="added to each command")
    arguments = parser.parse_args()
    if arguments.plateau % arguments.interval or arguments.plateau < 2 * arguments.interval:
        parser.error(f"--interval {arguments.interval}: must divide --plateau, at least twice")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common = conditions(device)
    rows: list[dict[str, Any]] = []
    failed = False
    for model, passes in itertools.product(arguments.models, arguments.passes):
        try:
            rows += [{**row, **common} for row in measure(model, passes, arguments)]
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed = True
            print(f"{model}: failed: {error}", file=sys.stderr)
        if rows:
            path = write_csv("random_ltd_steps", rows, arguments.output, device)
    if rows:
        print(f"wrote {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
