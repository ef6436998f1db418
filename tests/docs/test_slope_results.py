"""Tables and figures of SLoPe's measurements follow the CSV files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from result_files import reading_from, shows_every_measurement, write

PARTS = ("kernels", "products", "adapters", "layers", "on_the_cpu", "quality", "learning_rates", "steps")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, reading from an empty folder."""
    return reading_from("slope_results", tmp_path, monkeypatch)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_measured_yet_says_so(results: ModuleType, part: str, tmp_path: Path) -> None:
    assert getattr(results, part)() == "Not measured yet.\n"
    assert results.figures(tmp_path) == []


def test_kernels_and_products_show_their_numbers(results: ModuleType, tmp_path: Path) -> None:
    kernel = {"op": "compress", "pattern": "2:4", "dtype": "bfloat16", "shape": "64x32",
              "milliseconds": 0.01234, "gigabytes_per_second": 1234.4, "fraction_of_floor": 0.876,
              "reference_milliseconds": 1.5, "gather_milliseconds": ""}  # fmt: skip
    write(tmp_path, "slope_kernels", [kernel])
    assert "| compress | 2:4 | bfloat16 | 64x32 | 0.0123 | 1234 | 87.6% | 1.500 | - |" in results.kernels()
    product = {"op": "forward", "rows": 64, "k": 32, "tokens": 128, "dense_milliseconds": 2.0,
               "bare_milliseconds": 1.0, "milliseconds": 1.25, "speedup": 1.6, "over_bare": 1.25,
               "choice": "cusparselt", "tiles": 1, "token_splits": 2}  # fmt: skip
    write(tmp_path, "slope_gemm", [product])
    assert "| 1.60x | 1.250 | cusparselt | 1, 2 |" in results.products()
    assert "Some GPU, torch 2.0, cuda 13.0, python 3.12, commit abc; `python x.py`." in results.products()


def test_layers_show_ratios_parts_memory_and_a_figure(results: ModuleType, tmp_path: Path) -> None:
    timed = {"tokens": 8, "dense_ms": 3.0, "slope_ms": 2.0, "ratio": 1.5}
    split = {f"{side}_{part}_ms": 1.0 for side in ("dense", "slope")
             for part in ("forward", "input_gradient", "weight_gradient")}  # fmt: skip
    memory = {"tokens": 8, "ratio": 0.6562, "dense_bytes": 2**21, "slope_bytes": 2**20,
              "states_and_masks_ratio": 0.5156, "measured": "allocator"}  # fmt: skip
    write(tmp_path, "slope_layer", [
        {"part": "layer", "shape": "64x32", **timed, **split, "refresh_ms": 0.5, "select_columns_ms": 0.25},
        *({"part": part, "shape": "hidden 64", **timed} for part in ("block", "inference")),
        {"part": "memory", "shape": "64x32", **memory}, {"part": "memory, flat", "shape": "64x32", **memory},
    ])  # fmt: skip
    text = results.layers()
    assert text.count("| 3.000 | 2.000 | 1.50x | -, - |") == 3
    assert "| 64x32 | 1.000, 1.000 | 1.000, 1.000 | 1.000, 1.000 | 0.5000 | 0.2500 |" in text
    assert "| 64x32 | in a flat buffer, operands kept | 2.0 | 1.0 | 0.656 | 0.516 | allocator |" in text
    (figure,) = results.figures(tmp_path)
    assert figure.name in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_quality_compares_arms_of_one_seed(results: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "slope_quality_tiny", [
        {"size": "tiny", "arm": arm, "seed": seed, "parameters": 10, "step": step, "tokens": 100 * step,
         "valid_loss": loss - step}
        for seed, shift in ((0, 0.0), (1, 1.0))
        for arm, loss in (("dense", 9.0 + shift), ("slope", 9.5 + 2 * shift))
        for step in (0, 1, 2)
    ])  # fmt: skip
    text = results.quality()
    assert "| dense | 10 | 2 | 7.5000 +- 0.7071 | - |" in text
    assert "| SLoPe | 10 | 2 | 8.5000 +- 1.4142 | +1.0000 +- 0.7071 |" in text
    assert [path.name in text for path in results.figures(tmp_path)] == [True]


def test_every_measurement_in_the_repository_is_shown() -> None:
    shows_every_measurement("slope")


def test_steps_stand_beside_the_dense_model_of_their_size(results: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"case": f"{model}-{kind}", "tokens_per_second": speed, "model_tflops": 1.0, "peak_memory": memory}
        for model, kind, speed, memory in (
            ("a", "dense", 100, 2**31), ("a", "slope", 115, 2**30),
            ("b", "fused", 10, 2**30), ("b", "slope", 9, 2**30),
        )
    ]  # fmt: skip
    write(tmp_path, "training_step_slope", rows)
    text = results.steps()
    assert "| a-slope | - | 115 | 1.150x | 1 | 1.0 | 0.500 |" in text
    assert "| b-slope | - | 9 | 0.900x | 1 | 1.0 | 1.000 |" in text


def test_learning_rates_show_the_last_loss_of_each(results: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"size": "tiny", "arm": arm, "lr": lr, "step": step, "valid_loss": loss}
        for arm, lr, step, loss in (
            ("dense", 0.002, 1, 9.0), ("dense", 0.002, 2, 3.5),
            ("slope", 0.002, 2, 4.25), ("dense", 0.001, 2, 3.0),
        )
    ]  # fmt: skip
    write(tmp_path, "slope_learning_rates", rows)
    text = results.learning_rates()
    assert text.index("| 0.001 | 3.0000 | - |") < text.index("| 0.002 | 3.5000 | 4.2500 |")
