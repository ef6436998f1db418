"""Tables and figures of L-GreCo's measurements follow the CSV files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from result_files import names_its_command, reading_from, shows_every_measurement, write

PARTS = ("planner", "hosts", "plan_costs", "quality", "choices", "steps", "kernels")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, reading from an empty folder."""
    return reading_from("lgreco_results", tmp_path, monkeypatch)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_measured_yet_names_the_command_for_it(
    results: ModuleType, part: str, tmp_path: Path
) -> None:
    names_its_command(results, part, tmp_path)


def test_all_parts_are_written(results: ModuleType) -> None:
    assert [render.__name__ for render in results.PARTS.values()] == list(PARTS)


def test_hosts_show_gains_over_no_compression_and_plans_over_their_default(
    results: ModuleType, tmp_path: Path
) -> None:
    row = {"size": "10m", "rate": "1gbit", "parameters": 10000, "tokens": 32, "steps": 12, "processor_ms": 60}
    none = {**row, "arm": "none", "ms": 400.0, "bytes": 40e6}
    uniform = {**row, "arm": "powersgd", "ms": 100.0, "bytes": 2e6, "planned": 1900, "planned_default": 1900,
               "error": "nan", "budget": "nan"}  # fmt: skip
    plan = {"planned": 1000, "planned_default": 1900, "error": 0.99, "budget": 1.0}
    cost = {"plan_ms": 800, "plan_bytes": 4e7}
    chosen = {**row, "arm": "lgreco_powersgd", "ms": 80.0, "bytes": 1e6, **plan, **cost}
    write(tmp_path, "lgreco_hosts", [none, uniform, chosen, {**none, "rate": "10gbit", "ms": 90.0}])
    text = results.hosts()
    assert "| no compression | 40.00 | 1.0x | - | - | 60 | 380 | 1.00x | 400 | 1.00x |" in text
    assert "| PowerSGD, uniform | 2.00 | 20.0x | - | - | 60 | 76 | 5.00x | 100 | 4.00x |" in text
    assert "| L-GreCo on PowerSGD | 1.00 | 40.0x | 1.90x | 0.990 | 60 | 68 | 5.59x | 80 | 5.00x |" in text
    assert "| no compression | 40.00 | 1.0x | - | - | 60 | 92 | 1.00x | 90 | 1.00x |" in text
    assert "32 tokens a rank and step, 10gbit, medians of 12 steps:" in text
    assert "| L-GreCo on PowerSGD | 1gbit | 800 | 40.0 | 1.00% |" in results.plan_costs()


def test_quality_compares_arms_of_one_seed(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "lgreco_quality_tiny", [
        {"size": "tiny", "arm": arm, "seed": seed, "parameters": 10, "step": step, "tokens": 100 * step,
         "valid_loss": loss - step, "ratio": ratio, "plan_seconds": 2.0}
        for seed, shift in ((0, 0.0), (1, 1.0))
        for arm, loss, ratio in (("none", 9.0 + shift, 1.0), ("lgreco_mixed", 9.5 + 2 * shift, 12.5))
        for step in (0, 1, 2)
    ])  # fmt: skip
    text = results.quality()
    assert "| L-GreCo, mixed | 10 | 2 | 8.5000 +- 1.4142 | +1.0000 +- 0.7071 |" in text
    assert "| L-GreCo, mixed | +12.95% | 12.5x | 2.0 |" in text
    assert [path.name in text for path in results.figures(tmp_path)] == [True]


def test_choices_show_plans_and_a_figure_of_each_arm(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "lgreco_choices_tiny", [
        {"size": "tiny", "arm": arm, "seed": 0, "step": step, "layer": layer, "compressor": compressor,
         "setting": 4, "bits": bits, "plan_bytes": 100, "default_bytes": 150, "raw_bytes": 1000,
         "error": error, "budget": 2.0}
        for arm in ("lgreco_powersgd", "lgreco_mixed")
        for step, error in ((0, "nan"), (16, 1.5))
        for layer, compressor, bits in (("a.weight", "powersgd", 2.0), ("b.weight", "qsgd", 4.0))
    ])  # fmt: skip
    text = results.choices()
    assert "| 0 | 10.0x | 1.50x | - | 2.00, 4.00 | powersgd 1, qsgd 1 |" in text
    assert "| 16 | 10.0x | 1.50x | 0.750 | 2.00, 4.00 | powersgd 1, qsgd 1 |" in text
    drawn = results.figures(tmp_path)
    assert len(drawn) == 2 and all(path.name in text for path in drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_steps_show_bytes_and_the_rate_at_which_they_are_as_fast_as_dense_ones(
    results: ModuleType, tmp_path: Path
) -> None:
    row = {"gpus": 2, "tokens_per_second": 100000, "peak_memory": 2**31}
    sent = {"bytes": 1e8, "raw_bytes": 26e8}
    write(tmp_path, "training_step_lgreco", [
        {**row, "case": "1.3b-fused", "ms_per_step": 300.0, "bytes": "", "raw_bytes": ""},
        {**row, **sent, "case": "1.3b-lgreco", "ms_per_step": 400.0},
        {**row, **sent, "case": "1.3b-lgreco-qsgd", "ms_per_step": 240.0},
    ])  # fmt: skip
    text = results.steps()
    assert "| 1.3b-fused | 2 | 300.0 | 1.00x | 100,000 | - | - | - | - | 2.0 |" in text
    assert "| 1.3b-lgreco | 2 | 400.0 | 0.75x | 100,000 | 100.0 | 2,600.0 | 26.0x | 200 | 2.0 |" in text
    assert "| 1.3b-lgreco-qsgd | 2 | 240.0 | 1.25x | 100,000 | 100.0 | 2,600.0 | 26.0x | any | 2.0 |" in text


def test_planner_and_kernels_show_their_numbers(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "lgreco_planner", [
        {"instance": "dense", "layers": 300, "options": 60, "buckets": 10000, "plan_ms": 41.26,
         "solve_ms": 30.0, "reference_ms": 900.4, "gain": 2.5, "budget_used": 0.99987}
    ])  # fmt: skip
    assert "| dense | 300 x 60 | 10000 | 41.3 | 30.0 | 900 | 2.50x | 99.99% |" in results.planner()
    row = {"kernel": "quantise", "elements": 1 << 26, "dtype": "float32", "detail": "4 bits",
           "milliseconds": 0.12, "floor_milliseconds": 0.1, "times_the_floor": 1.2,
           "plain_torch_milliseconds": 1.79, "speedup_over_plain_torch": 14.9}  # fmt: skip
    rival = {"rival": "torch.topk", "rival_milliseconds": 1.44}
    write(tmp_path, "lgreco_kernels", [row, {**row, "kernel": "topk", "detail": "", **rival}])
    start = "67,108,864 | float32 | 0.120 | 0.100 | 1.20x | 1.790 | 14.90x"
    assert f"| quantise 4 bits | {start} | - | - |" in results.kernels()
    assert f"| topk | {start} | `torch.topk` | 1.440 |" in results.kernels()


def test_every_measurement_in_the_repository_is_shown() -> None:
    shows_every_measurement("lgreco")
