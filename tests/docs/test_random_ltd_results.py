"""Tables and figures of random-LTD's schedules and measurements follow the code and the CSV files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from result_files import names_its_command, reading_from, shows_every_measurement, write

PARTS = ("steps", "kernels", "quality")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, reading from an empty folder."""
    return reading_from("random_ltd_results", tmp_path, monkeypatch)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_measured_yet_names_the_command_for_it(
    results: ModuleType, part: str, tmp_path: Path
) -> None:
    names_its_command(results, part, tmp_path, "random_ltd_")


def test_the_papers_schedules_are_computed_beside_its_claims(results: ModuleType) -> None:
    lines = results.schedules().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line]
    assert [row[3:] for row in cells] == [
        ["33.3%", "30.33%"],
        ["26.2%", "26.23%"],
        ["31.1%", "31.14%"],
        ["14.1%", "14.12%"],
        ["22.3%", "22.29%"],
    ]
    assert cells[0][1:3] == ["128 to 2048, +16 each 1.75 G tokens", "200,272 of 286,102"]


def test_steps_show_the_saving_and_each_length(results: ModuleType, tmp_path: Path) -> None:
    head = {"model": "1.3b", "gpus": 1, "micro_batch": 8, "passes": 4}
    write(tmp_path, "random_ltd_steps", [
        {**head, "part": "dense", "kept": 2048, "milliseconds": 320.0},
        *({**head, "part": "step", "kept": kept, "milliseconds": 320.0 * share, "relative": share,
           "tokens_per_second": 50000 / share, "peak_memory": 2**31}
          for kept, share in ((128, 0.25), (2048, 1.0))),
        {**head, "part": "schedule", "time_saved": 0.2912, "layer_tokens_saved": 0.303,
         "products_saved": 0.31},
    ])  # fmt: skip
    text = results.steps()
    assert "| 1.3b | 1 | 8 | 4 | 320.0 | 29.1% | 30.3% | 31.0% |" in text
    assert "| 1.3b | 4 | 128 | 80.0 | 25.0% | 200000 | 2.0 |" in text
    assert "Some GPU, torch 2.0, cuda 13.0, python 3.12, commit abc; `python x.py`." in text
    (figure,) = results.figures(tmp_path)
    assert figure.name in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_kernels_show_the_columns_of_their_file(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "random_ltd_kernels", [
        {"op": "gather", "shape": "8x4", "milliseconds": 0.0123456, "bytes": 12345678,
         "fraction_of_floor": 0.876, "deepspeed_milliseconds": ""},
    ])  # fmt: skip
    text = results.kernels()
    assert "| op | shape | milliseconds | bytes | fraction of floor | deepspeed, ms |" in text
    assert "| gather | 8x4 | 0.01235 | 12345678 | 87.6% | - |" in text


def test_quality_compares_arms_of_one_seed_by_tokens_and_layer_tokens(
    results: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path, "random_ltd_quality_tiny", [
        {"size": "tiny", "arm": arm, "seed": seed, "parameters": 10, "lr": 6e-4, "step": step,
         "tokens": 1000 * step, "layer_tokens": cost * step, "valid_loss": loss - step, "seconds": 5 * step}
        for seed, shift in ((0, 0.0), (1, 1.0))
        for arm, loss, cost in (("dense", 9.0 + shift, 4000), ("growing", 9.5 + 2 * shift, 3000))
        for step in (0, 1, 2)
    ])  # fmt: skip
    text = results.quality()
    assert "Size `tiny`, learning rate 0.0006:" in text
    assert "| dense | 2,000 | 8,000 | 2 | 7.5000 +- 0.7071 | - |" in text
    assert "| growing length | 2,000 | 6,000 | 2 | 8.5000 +- 1.4142 | +1.0000 +- 0.7071 |" in text
    drawn = results.figures(tmp_path)
    assert [path.name in text for path in drawn] == [True, True]
    assert drawn[0].read_bytes() != drawn[1].read_bytes()


def test_a_longer_dense_run_is_the_last_row_and_in_the_figures(results: ModuleType, tmp_path: Path) -> None:
    def curve(arm: str, loss: float, steps: int) -> list[dict[str, Any]]:
        head = {"size": "tiny", "arm": arm, "seed": 0, "lr": 6e-4}
        return [
            {
                **head,
                "step": step,
                "tokens": 1000 * step,
                "layer_tokens": 4000 * step,
                "valid_loss": loss - step,
            }
            for step in range(steps + 1)
        ]

    write(tmp_path, "random_ltd_quality_tiny", [*curve("dense", 9.0, 2), *curve("growing", 8.5, 2)])
    figures = [path.read_bytes() for path in results.figures(tmp_path)]
    assert "more steps" not in results.quality()
    write(tmp_path, "random_ltd_longer_small", [{**row, "size": "small"} for row in curve("dense", 9.0, 4)])
    assert "more steps" not in results.quality()
    write(tmp_path, "random_ltd_longer_tiny", curve("dense", 9.25, 4))
    rows = [line for line in results.quality().splitlines() if line.startswith("|")]
    assert rows[-1] == "| dense, more steps | 4,000 | 16,000 | 1 | 5.2500 | -1.7500 |"
    assert "| dense | 2,000 | 8,000 | 1 | 7.0000 | - |" in rows
    drawn = [path.read_bytes() for path in results.figures(tmp_path)]
    assert all(new != old for new, old in zip(drawn, figures, strict=True))


def test_every_measurement_in_the_repository_is_shown() -> None:
    shows_every_measurement("random_ltd")
