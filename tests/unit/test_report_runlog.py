"""A run's log is strict JSON whatever is written, and reads back in spite of crashes and resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.errors import UserError
from ds_efficient.report.runlog import RunLog, plain, read_run


def _strict(line: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_scalars_of_numpy_and_torch_become_plain_numbers(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    with RunLog(path) as log:
        log.write(
            "train", step=np.int64(3), loss=torch.tensor(1.5), lr=np.float32(0.25), list=torch.arange(2),
            ok=np.bool_(True), where=path, inner={"share": torch.tensor(0.5), 1: (1, 2)},
        )  # fmt: skip
    record = _strict(path.read_text())
    assert record == {
        "kind": "train", "step": 3, "loss": 1.5, "lr": 0.25, "list": [0, 1], "ok": True, "where": str(path),
        "inner": {"share": 0.5, "1": [1, 2]},
    }  # fmt: skip


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path):
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("train", step=1, loss=math.nan, slope={"norm": torch.tensor(math.inf)}, lr=0.1)
    record = _strict((tmp_path / "run.jsonl").read_text())
    assert record["loss"] is None and record["slope"] == {"norm": None}
    assert record["nonfinite"] == ["loss", "slope.norm"]


_json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=100)
@given(_json_like)
def test_everything_written_is_one_line_of_strict_json(value):
    line = json.dumps(plain(value), allow_nan=False)
    assert "\n" not in line
    _strict(line)


def test_lines_are_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    log.write("run", world_size=1)
    assert read_run(tmp_path).start["world_size"] == 1
    log.close()


def test_a_log_in_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunLog(tmp_path / "file" / "run.jsonl")


def _write(path, *records):
    with RunLog(path / "run.jsonl") as log:
        for record in records:
            log.write(**record)


def _train(step, loss):
    return {"kind": "train", "step": step, "loss": loss, "tokens": step * 10, "seconds": step * 0.5}


def test_the_later_of_repeated_steps_counts(tmp_path):
    _write(tmp_path, {"kind": "run"}, _train(1, 5.0), _train(2, 4.0), _train(1, 3.0))
    assert [(line["step"], line["loss"]) for line in read_run(tmp_path).train] == [(1, 3.0), (2, 4.0)]


def test_steps_after_the_resumed_checkpoint_are_forgotten(tmp_path):
    _write(
        tmp_path,
        {"kind": "run"},
        *(_train(step, 5.0) for step in (1, 2, 3, 4)),
        {"kind": "eval", "step": 2, "split": "valid", "loss": 5.0},
        {"kind": "eval", "step": 4, "split": "valid", "loss": 4.9},
        {"kind": "end", "step": 4, "reason": "SIGTERM"},
        {"kind": "resume", "step": 2},
        _train(3, 4.0),
    )
    run = read_run(tmp_path)
    assert [(line["step"], line["loss"]) for line in run.train] == [(1, 5.0), (2, 5.0), (3, 4.0)]
    assert [line["step"] for line in run.evals["valid"]] == [2]
    assert run.resumes == [2] and run.end is None


def test_a_truncated_last_line_is_skipped_and_said(tmp_path):
    _write(tmp_path, {"kind": "run"}, _train(1, 5.0))
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    run = read_run(tmp_path)
    assert len(run.train) == 1
    assert "line(s): 3 (the last line is cut off)" in run.notes[0]
    _write(tmp_path, {"kind": "resume", "step": 1}, _train(2, 4.0))  # goes on, on a line of its own
    again = read_run(tmp_path)
    assert [line["step"] for line in again.train] == [1, 2]
    assert "unreadable line(s): 3" in again.notes[0]


def test_unknown_kinds_are_ignored_and_the_last_of_several_runs_is_read(tmp_path):
    _write(
        tmp_path, {"kind": "run", "world_size": 1}, _train(1, 5.0), {"kind": "weather", "step": "rain"},
        {"kind": "run", "world_size": 2}, _train(7, 2.0), {"kind": "evidence", "slope": {"acted": True}},
        {"kind": "end", "step": 7, "reason": "done"},
    )  # fmt: skip
    run = read_run(tmp_path)
    assert run.start["world_size"] == 2 and [line["step"] for line in run.train] == [7]
    assert run.evidence == {"slope": {"acted": True}} and run.end is not None
    assert "several runs" in run.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("hello\n", "is not the log of a run"),
        ('{"a": 1}\n[2]\n', "is not"),
    ],
)
def test_files_that_are_no_log_are_refused(tmp_path, text, message):
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)


def test_missing_logs_are_refused_with_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"holds no run\.jsonl; give the folder that --run-dir"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read_run(tmp_path / "nowhere")
