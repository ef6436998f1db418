"""Tables and figures of MKOR's measurements follow the CSV files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from result_files import names_its_command, reading_from, shows_every_measurement, write


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, reading from an empty folder."""
    return reading_from("mkor_results", tmp_path, monkeypatch)


@pytest.mark.parametrize("part", ["problems", "settings", "formula", "quality", "updates", "step"])
def test_what_is_not_measured_yet_names_the_command_for_it(
    results: ModuleType, part: str, tmp_path: Path
) -> None:
    names_its_command(results, part, tmp_path, "mkor_")


def test_a_loss_is_reached_in_proportion_between_evaluations_or_not_at_all(results: ModuleType) -> None:
    curve = [results.Point(0, 9.0, 0.0), results.Point(10, 5.0, 1.0), results.Point(20, 4.0, 3.0)]
    assert results.reached(curve, 4.5) == (15, 4.5, 2.0)
    assert results.reached(curve, 5.0) == (10, 5.0, 1.0)
    assert results.reached(curve, 3.9) is None


def rows(
    arm: str, lr: float, losses: tuple[float, ...], name: str, seed: int = 0, **more: object
) -> list[dict]:
    return [
        {"arm": arm, "seed": seed, "lr": lr, "step": 10 * place, "seconds": 0.5 * place, name: loss, **more}
        for place, loss in enumerate(losses)
    ]


def test_problems_compare_tuned_contestants_with_tuned_adamw(results: ModuleType, tmp_path: Path) -> None:
    head: dict[str, Any] = {"problem": "regression", "tuned": 1}
    write(tmp_path, "mkor_problems", [
        *rows("adamw", 0.01, (9.0, 7.0, 5.0), "loss", **head),
        *rows("adamw", 0.01, (9.0, 7.0, 3.0), "loss", 1, **head),
        *rows("adamw", 0.1, (9.0, 7.0, 6.0), "loss", problem="regression", tuned=0)[-1:],
        *rows("mkor", 0.03, (9.0, 4.0, 1.0), "loss", **head),
        *rows("mkor", 0.03, (9.0, 4.0, 1.0), "loss", 1, **head),
        *rows("sgd", 0.3, (9.0, 8.0, 7.0), "loss", **head),
        *rows("lamb", 0.3, (9.0, 6.0, 4.9), "loss", **head),
        *rows("muon", 0.1, (9.0, 4.0, 1.0), "loss", **head),
        *rows("muon", 0.1, (9.0, 7.0, 6.0), "loss", 1, **head),
    ])  # fmt: skip
    text = results.problems()
    assert "| AdamW | 0.01 of 2 | 2 | 4.0000 +- 1.4142 | 20 | 1.00x | 1.00 | 1.00 |" in text
    assert (
        "| MKOR + AdamW | 0.03 of 1 | 2 | 1.0000 +- 0.0000 | 10 | 2.00x (1.50 to 2.50) | 0.50 | 1.00 |"
        in text
    )
    assert (
        "| Muon | 0.1 of 1 | 2 | 3.5000 +- 3.5355 | 18 | 1.14x (not with every seed) | 0.88 | 1.00 |" in text
    )
    assert "| SGD | 0.3 of 1 | 1 | 7.0000 | not reached | - | - | 1.00 |" in text
    assert "| LAMB | 0.3 of 1 | 1 | 4.9000 | 19 | 1.05x | 0.95 | 1.00 |" in text  # with the seed that it has
    assert [path.name in text for path in results.figures(tmp_path)] == [True]


def test_without_the_base_a_comparison_says_so(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "mkor_problems", rows("mkor", 0.03, (9.0, 4.0), "loss", problem="regression", tuned=1))
    assert "AdamW is missing" in results.problems()


def test_quality_takes_the_best_learning_rate_of_each_arm(results: ModuleType, tmp_path: Path) -> None:
    head: dict[str, Any] = {"size": "small", "parameters": 2_000_000, "tokens": 640}
    write(tmp_path, "mkor_quality_small", [
        *rows("adamw", 0.001, (9.0, 7.0, 5.0), "valid_loss", **head),
        *rows("adamw", 0.01, (9.0, 7.0, 6.0), "valid_loss", **head),
        *rows("mkor_right", 0.001, (9.0, 7.0, 6.0), "valid_loss", **head),
        *rows("mkor_right", 0.01, (9.0, 6.0, 4.0), "valid_loss", **head),
        *rows("mkor_right", 0.01, (9.0, 9.0, 9.0), "valid_loss", 1, **head),
        *rows("muon", 0.001, (9.0, 1.0, 1.0), "valid_loss", 1, **head),
    ])  # fmt: skip
    text = results.quality()
    assert "Size `small`, 2.0 million parameters, 20 steps, 640 tokens:" in text
    assert "| AdamW | 0.001 of 0.001, 0.01 | 1 | 5.0000 | 20 | 1.00x | 1.00 | 1.00 |" in text
    assert "| MKOR right + AdamW | 0.01 of 0.001, 0.01 | 1 | 4.0000 | 15 | 1.33x | 0.75 | 1.00 |" in text
    assert "| Muon | 0.001 of 0.001 | 0 | - | - | - | - | - |" in text  # no seed to compare with
    (figure,) = results.figures(tmp_path)
    assert figure.name in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_settings_formula_and_updates_show_their_numbers(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "mkor_settings", [
        *rows("mkor_right", 0.01, (9.0, 0.25), "loss", problem="regression", settings="", tuned=1),
        *rows("mkor_right", 0.03, (9.0, 0.125), "loss", problem="regression", settings="gamma=0.9", tuned=1),
    ])  # fmt: skip
    text = results.settings()
    assert "| MKOR right + AdamW | nothing | 0.25000 (0.01) |" in text
    assert "| MKOR right + AdamW | `gamma=0.9` | 0.12500 (0.03) |" in text
    write(tmp_path, "mkor_formula", [
        {"formula": formula, "threshold": threshold, "dtype": dtype, "update": 5, "largest": largest,
         "residual": residual}
        for formula, threshold, dtype, largest, residual in (
            ("sherman_morrison", "inf", "float64", 1.5, 1e-12), ("printed", "inf", "float64", 1e8, 300.0),
            ("printed", "inf", "float32", "nan", "nan"), ("printed", "10.0", "float32", 5e7, ""),
        )
    ])  # fmt: skip
    assert "| 5 | 1.5 | 1e-12 | 1e+08 | 3e+02 | nan | 5e+07 |" in results.formula()
    write(tmp_path, "mkor_updates", [
        {"factors": 1, "size": 1024, "dtype": "float32", "milliseconds": 0.01, "times_the_floor": 1.2,
         "plain_torch_milliseconds": 0.1, "speedup_over_plain_torch": 10.0, "inverse_milliseconds": 2.5,
         "speedup_over_inverse": 250.0},
        {"factors": 1, "size": 20480, "dtype": "float32", "milliseconds": 1.0, "times_the_floor": 1.1,
         "plain_torch_milliseconds": 3.0, "speedup_over_plain_torch": 3.0, "inverse_milliseconds": "",
         "speedup_over_inverse": ""},
    ])  # fmt: skip
    text = results.updates()
    assert "| 1 | 1024 | float32 | 0.0100 | 1.20x | 0.1000 | 10.0x | 2.50 | 250x |" in text
    assert "| 1 | 20480 | float32 | 1.0000 | 1.10x | 3.0000 | 3.0x | - | - |" in text


def test_a_step_shows_what_is_added(results: ModuleType, tmp_path: Path) -> None:
    row = {"form": "factored", "sides": "right", "rank": 128, "state_dtype": "float32", "layers": 96,
           "parameters": 1_200_000_000, "tokens": 16384, "precondition_ms": 5.0, "update_ms": 20.0,
           "statistics_ms": 1.0, "precondition_host_ms": 2.0, "update_host_ms": 4.0, "interval": 10,
           "added_ms": 7.1, "step_ms": 300.0, "added_share": 0.02367, "state_bytes": 2**28,
           "memory_share": 0.029, "scratch_bytes": 2**26}  # fmt: skip
    dense = {**row, "form": "dense", "rank": "", "precondition_host_ms": "", "update_host_ms": ""}
    write(tmp_path, "mkor_step", [row, {**dense, "scratch_bytes": ""}])
    text = results.step()
    assert "1,200,000,000 parameters in 96 layers, 16,384 tokens a step, an update every 10 steps" in text
    numbers = "7.10 | 2.4% | 0.25 | 2.9%"
    assert (
        f"| factored, rank 128 | right | float32 | 5.00 | 20.00 | 1.00 | 2.00, 4.00 | {numbers} | 64.0 |"
        in text
    )
    assert f"| dense | right | float32 | 5.00 | 20.00 | 1.00 | -, - | {numbers} | - |" in text


def test_every_measurement_in_the_repository_is_shown() -> None:
    shows_every_measurement("mkor")
