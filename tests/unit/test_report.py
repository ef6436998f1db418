"""Reports: the numbers are the log's, the figures are drawn, users' mistakes end in one message."""

from __future__ import annotations

import csv
import math

import pytest

from ds_efficient.cli import main
from ds_efficient.errors import UserError
from ds_efficient.report.runlog import Run, RunLog, read_run
from ds_efficient.report.summary import curve, eval_curve, steady, summarize, unique_names
from ds_efficient.report.write import write_report


def _write_run(folder, *, rate=100.0, end=True, mfu=None, versions=True):
    with RunLog(folder / "run.jsonl") as log:
        log.write(
            "run", config={"train_batch_size": 4}, command=["pretrain_gpt.py", "--lr", "1|2"], gpu=None,
            world_size=2, parameters=1234567, precision="bf16",
            versions={"torch": "2.13.0", "deepspeed": "0.19.8"} if versions else None,
        )  # fmt: skip
        log.write("eval", step=0, split="valid", loss=6.0, perplexity=math.exp(6), tokens=80)
        for step in (1, 2, 3, 4):
            log.write(
                "train", step=step, loss=6.0 - step, lr=0.1, grad_norm=1.0, tokens=step * 1000,
                layer_tokens=step * 4000, seconds=step * 2.0,
                tokens_per_second=rate * (0.1 if step == 1 else step),
                model_tflops=1.5, executed_tflops=2.0, mfu=mfu, peak_memory=step * 2**30,
                slope={"density": 0.5},
            )  # fmt: skip
        log.write("eval", step=4, split="valid", loss=2.5, perplexity=math.exp(2.5), tokens=80)
        log.write("evidence", slope={"acted": True, "summary": "8 layers ran sparse"})
        if end:
            log.write("end", step=4, reason="--train-iters 4 reached")
    return folder


@pytest.fixture
def run_folder(tmp_path):
    return _write_run(tmp_path / "first")


def test_summary_says_from_what_to_what(run_folder):
    found = summarize(read_run(run_folder))
    assert found.eval_loss == {"valid": (6.0, 2.5)}
    assert found.train_loss == (5.0, 2.0)
    assert (found.steps, found.tokens, found.seconds) == (4, 4000, 8.0)
    assert found.tokens_per_second == 300.0  # median without the first line
    assert found.peak_memory == 4 * 2**30 and found.mfu is None


def test_warm_up_is_left_out_of_medians_where_there_is_enough():
    assert steady([1.0, 2.0]) == [1.0, 2.0]
    assert steady([0.0, 5.0, 5.0]) == [5.0, 5.0]
    assert steady(list(range(40))) == list(range(4, 40))


def test_evaluations_stand_at_the_tokens_and_seconds_of_their_steps(run_folder):
    points = eval_curve(read_run(run_folder), "valid")
    assert (points.steps, points.tokens, points.seconds) == ([0, 4], [0.0, 4000.0], [0.0, 8.0])


def test_stated_places_of_evaluations_come_first(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("eval", step=2, split="valid", loss=1.0, train_tokens=77, train_seconds=7)
    points = eval_curve(read_run(tmp_path), "valid")
    assert (points.tokens, points.seconds) == ([77.0], [7.0])


def test_values_that_were_not_finite_leave_gaps(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        for step, loss in ((1, 3.0), (2, math.nan), (3, 2.0)):
            log.write("train", step=step, loss=loss, tokens=step, seconds=step)
    assert curve(read_run(tmp_path), "loss").steps == [1, 3]


def test_report_of_one_run_has_every_part(run_folder):
    _, names, written = write_report([run_folder])
    assert names == ["first"]
    assert {path.name for path in written} == {"report.md", "loss.png", "throughput.png", "first.csv"}
    assert all(path.parent == run_folder / "report" for path in written)
    text = (run_folder / "report" / "report.md").read_text()
    for part in (
        "| validation loss | 6.0000 to 2.5000 |", "| validation perplexity | 403.43 to 12.18 |",
        "| training loss | 5.0000 to 2.0000 |", "| tokens | 4,000 |", "| MFU | N/A |",
        "| tokens/s, median after warm-up | 300 |", "| peak memory of a rank | 4.00 GiB |",
        "| first | slope | yes | 8 layers ran sparse |", "| torch | 2.13.0 |", "![loss](loss.png)",
        "| ended | step 4: --train-iters 4 reached |", '"train_batch_size": 4',
    ):  # fmt: skip
        assert part in text
    for name in ("loss.png", "throughput.png"):
        data = (run_folder / "report" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000


def test_figures_have_units_legends_and_every_point(run_folder, tmp_path):
    pytest.importorskip("matplotlib")
    from ds_efficient.report.figures import loss_figure, throughput_figure

    runs = [read_run(run_folder), read_run(_write_run(tmp_path / "second", rate=200.0))]
    figure = loss_figure(runs, ["a", "b"])
    left, right = figure.axes
    assert (
        left.get_xlabel() == "training tokens (thousand)" and right.get_xlabel() == "training time (seconds)"
    )
    assert left.get_ylabel() == "loss (nats a token)"
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == ["a, training", "a, validation", "b, training", "b, validation"]
    assert list(left.lines[0].get_xdata()) == [1.0, 2.0, 3.0, 4.0]
    assert list(left.lines[1].get_ydata()) == [6.0, 2.5]
    (axes,) = throughput_figure(runs, ["a", "b"]).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a, median 300", "b, median 600"]


def test_csv_has_one_row_a_step_with_evaluations_and_metrics(run_folder):
    write_report([run_folder], figures=False)
    with open(run_folder / "report" / "first.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["valid_loss"] == "6.0" and rows[0]["loss"] == ""
    assert rows[4]["loss"] == "2.0" and rows[4]["slope.density"] == "0.5" and rows[4]["mfu"] == ""


def test_several_runs_are_compared_in_one_folder(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = _write_run(tmp_path / "second", mfu=0.4, end=False, versions=False)
    write_report([run_folder, other / "run.jsonl"], figures=False)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "|  | first | second |" in text and "| MFU | N/A | 40.0 % |" in text
    assert "not ended" in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "first.csv", "second.csv"}


def test_equal_names_are_told_apart(tmp_path):
    paths = [tmp_path / "x" / "run" / "run.jsonl", tmp_path / "y" / "run" / "run.jsonl"]
    assert unique_names([Run(path, "run") for path in paths]) == ["x-run", "y-run"]
    same = [Run(paths[0], "run"), Run(paths[0], "run")]
    assert len(set(unique_names(same))) == 2


def test_a_log_with_only_its_first_line_gives_a_report(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("run", world_size=1)
    write_report([tmp_path])
    assert "| training loss | N/A |" in (tmp_path / "report" / "report.md").read_text()


def test_command_prints_the_table_and_the_files(run_folder, capsys):
    assert main(["report", str(run_folder), "--no-figures"]) == 0
    out = capsys.readouterr().out
    assert "6.0000 to 2.5000" in out and f"wrote {run_folder / 'report' / 'report.md'}" in out


@pytest.mark.parametrize("content", [None, "", "no run\n"])
def test_command_refuses_what_is_no_run(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "run.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "Traceback" not in error
    assert not (tmp_path / "report").exists()


def test_an_unwritable_output_is_refused(run_folder, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="choose another with --output"):
        write_report([run_folder], tmp_path / "taken", figures=False)
