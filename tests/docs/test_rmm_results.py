"""Tables and figures of RMM's measurements follow the CSV files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from result_files import names_its_command, reading_from, shows_every_measurement, write

PARTS = ("layers", "memory", "kernels", "quality")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, reading from an empty folder."""
    return reading_from("rmm_results", tmp_path, monkeypatch)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_measured_yet_names_the_command_for_it(
    results: ModuleType, part: str, tmp_path: Path
) -> None:
    names_its_command(results, part, tmp_path)


def test_layers_blocks_and_figures_show_their_numbers(results: ModuleType, tmp_path: Path) -> None:
    timed = {"tokens": 8, "ratio": 0.125, "exact_ms": 3.0, "rmm_ms": 2.0, "speedup": 1.5,
             "exact_saved_bytes": 2**20, "rmm_saved_bytes": 2**17}  # fmt: skip
    parts = {"project_input_ms": 0.1, "project_gradient_ms": 0.2, "product_ms": 0.3,
             "exact_weight_gradient_ms": 0.9}  # fmt: skip
    write(tmp_path, "rmm_layer", [
        *({"part": "layer", "shape": "8x4x4", "sketch": sketch, **timed, **parts, "exact_host_ms": 0.5,
           "rmm_host_ms": 0.75} for sketch in ("gaussian", "rows")),
        {"part": "block", "shape": "hidden 64", "sketch": "gaussian", **timed, "exact_peak_bytes": 2**21,
         "rmm_peak_bytes": 2**20},
        {"part": "encoder", "shape": "2 x 64", "sketch": "gaussian", **timed, "ratio": 0.3},
    ])  # fmt: skip
    text = results.layers()
    assert "| 8x4x4 | 1/8 | gaussian | 3.000 | 2.000 | 1.50x | 12.5% | 0.50, 0.75 |" in text
    assert "| 8x4x4 | 1/8 | rows | 0.100 | 0.200 | 0.300 | 0.900 |" in text
    (figure,) = results.figures(tmp_path)
    assert figure.name in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    memory = results.memory()
    assert "| gaussian, 1/8 | 3.00 | 2.00 | 1.50x | 1.0, 0.1 | 12.5% | 2.0, 1.0 | 50.0% |" in memory
    saved = "3.00 | 2.00 | 1.50x | 1.0, 0.1 | 12.5% | -, - | - |"
    assert f"| encoder, step | 2 x 64 | 8 | gaussian, 0.3 | {saved}" in memory
    assert "Some GPU, torch 2.0, cuda 13.0, python 3.12, commit abc; `python x.py`." in memory


def test_kernels_show_their_numbers(results: ModuleType, tmp_path: Path) -> None:
    row = {"sketch": "count", "way": "gemm", "shape": "8x4", "block": 512, "projected": 64,
           "milliseconds": 0.01234, "fraction_of_floor": 0.876, "speedup_over_given_sketch": 1.5,
           "floor_milliseconds": 0.01}  # fmt: skip
    torch = {"plain_torch_milliseconds": 0.5, "speedup_over_plain_torch": 40.0}
    rows = [
        {**row, **torch},
        {**row, "way": "fused", "milliseconds": 0.04},
        {**row, "sketch": "rows", "way": "fused", "milliseconds": 0.02},
        {**row, "sketch": "srht"},
        {**row, "sketch": "srht", "way": "hadamard", "milliseconds": 0.05},
    ]
    write(tmp_path, "rmm_kernels", rows)
    text = results.kernels()
    assert "| count | gemm | 8x4 | 512 to 64 | 0.0123 | 87.6% | 1.50x | 0.5000 | 40.00x |" in text
    assert "| rows | fused | 8x4 | 512 to 64 | 0.0200 | 87.6% | 1.50x | - | - |" in text
    assert "| count | fused |" not in text
    tried = results.tried()
    assert "| count | 8x4 | 512 to 64 | 0.0123 | - | 0.0400 | - | 0.0100 |" in tried
    assert "| srht | 8x4 | 512 to 64 | 0.0123 | - | - | 0.0500 | 0.0100 |" in tried
    assert "rows" not in tried.replace("to rows", "")
    write(tmp_path, "rmm_projections", [{**row, "milliseconds": 0.03, **torch}])
    assert "0.0300" in results.kernels() and "0.0123" not in results.kernels()
    assert results.tried() == tried


def test_quality_compares_arms_of_one_seed(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "rmm_quality_tiny", [
        {"size": "tiny", "arm": arm, "seed": seed, "parameters": 10, "step": step, "tokens": 100 * step,
         "valid_loss": loss - step}
        for seed, shift in ((0, 0.0), (1, 1.0))
        for arm, loss in (("exact", 9.0 + shift), ("ratio8", 9.5 + 2 * shift))
        for step in (0, 1, 2)
    ])  # fmt: skip
    text = results.quality()
    assert "| exact gradients | 10 | 2 | 7.5000 +- 0.7071 | - |" in text
    assert "| ratio 1/8 | 10 | 2 | 8.5000 +- 1.4142 | +1.0000 +- 0.7071 |" in text
    assert [path.name in text for path in results.figures(tmp_path)] == [True]


def test_every_measurement_in_the_repository_is_shown() -> None:
    shows_every_measurement("rmm")
