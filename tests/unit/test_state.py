"""Files of a checkpoint: plain values, whole or refused, the old one kept until the new one is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core import state
from ds_efficient.errors import CheckpointError

LAYOUT = state.Layout(4, 2, 2, 1, 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
@settings(deadline=None, max_examples=40)
def test_plain_values_survive_without_pickles(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("plain") / "state.pt"
    state.save_tensors(path, {"value": value})
    assert state.load_tensors(path) == {"format": state.FORMAT, "value": value}
    assert torch.load(path, weights_only=True)["value"] == value


def test_tensors_survive(tmp_path: Path) -> None:
    saved = {"a": [torch.arange(3), (torch.ones(2, dtype=torch.bfloat16),)]}
    state.save_tensors(tmp_path / "state.pt", saved)
    found = state.load_tensors(tmp_path / "state.pt")
    assert torch.equal(found["a"][0], saved["a"][0]) and found["a"][1][0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, object()]}, r"state\.a\[1\]: object"),
        ({(1, 2): 3}, r"key \(1, 2\)"),
        ({"f": print}, "f: builtin"),
    ],
)
def test_anything_else_is_refused_by_its_place(tmp_path: Path, value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        state.save_tensors(tmp_path / "state.pt", value)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    state.write_atomic(path, lambda target: target.write_text("old"))

    def break_off(target: Path) -> None:
        target.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.write_atomic(path, break_off)
    assert path.read_text() == "old"
    state.write_atomic(path, lambda target: target.write_text("new"))
    assert path.read_text() == "new" and [item.name for item in tmp_path.iterdir()] == ["latest"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/state\.pt: cannot be written"):
        state.save_tensors(tmp_path / "file" / "state.pt", {})


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read"):
        state.load_tensors(tmp_path / "state.pt")


def test_another_format_and_a_missing_file_are_named(tmp_path: Path) -> None:
    torch.save({"format": state.FORMAT + 1}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="unknown format"):
        state.load_tensors(tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="missing"):
        state.load_tensors(tmp_path / "none.pt")


def checkpoint(folder: Path, tag: str, text: str = "weights") -> Path:
    """Save a checkpoint as `CheckpointStore` does."""
    staging = state.begin_saving(folder / tag)
    (staging / "model.pt").write_text(text)
    state.write_manifest(staging, LAYOUT, {"extra": 1})
    state.publish(staging, folder / tag)
    return folder / tag


def test_the_manifest_notices_every_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "global_step1")
    manifest = state.read_manifest(folder)
    assert manifest is not None and manifest["files"] == {"model.pt": 7} and manifest["extra"] == 1
    assert manifest["layout"] == vars(LAYOUT)
    state.check_files(folder, manifest)
    (folder / "model.pt").write_text("weight")
    with pytest.raises(CheckpointError, match=r"model\.pt: 6 bytes, was 7"):
        state.check_files(folder, manifest)
    (folder / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt: missing"):
        state.check_files(folder, manifest)


def test_no_manifest_and_a_broken_one(tmp_path: Path) -> None:
    assert state.read_manifest(tmp_path) is None
    (tmp_path / state.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        state.read_manifest(tmp_path)


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "global_step2", "old")
    staging = state.begin_saving(folder)
    (staging / "model.pt").write_text("new")
    (staging / "of_an_interrupted_save.pt").write_text("")
    assert (folder / "model.pt").read_text() == "old" and state.whole_tags(tmp_path) == ["global_step2"]
    assert list(state.begin_saving(folder).iterdir()) == []
    assert checkpoint(tmp_path, "global_step2", "new") == folder
    assert (folder / "model.pt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["global_step2"]


def test_whole_checkpoints_are_listed_by_their_number(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        checkpoint(tmp_path, f"global_step{step}")
    (tmp_path / "global_step200").mkdir()
    assert state.whole_tags(tmp_path) == ["global_step9", "global_step10", "global_step100"]
    assert state.others(tmp_path).endswith("global_step9, global_step10, global_step100")
    assert "no whole checkpoint" in state.others(tmp_path / "none")


def test_latest(tmp_path: Path) -> None:
    assert state.latest_tag(tmp_path) is None
    checkpoint(tmp_path, "global_step3")
    (tmp_path / "latest").write_text("global_step3\n")
    assert state.latest_tag(tmp_path) == "global_step3"
    for wrong, text in (("", "empty"), ("global_step4", "names 'global_step4'")):
        (tmp_path / "latest").write_text(wrong)
        with pytest.raises(CheckpointError, match=rf"{text}.*--ckpt-step.*global_step3"):
            state.latest_tag(tmp_path)


def test_layouts_that_differ_are_told_by_argument() -> None:
    assert LAYOUT.problems(vars(LAYOUT)) == []
    other = state.Layout(8, 1, 4, 2, 2)
    text = "\n".join(other.problems(vars(LAYOUT)))
    for part in (
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 1",
        "stage 1",
        "2 data-parallel",
    ):
        assert part in text
    assert other.problems(vars(LAYOUT), universal=True) == []


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_weights_alone_need_the_same_layout_only_with_stage_3(
    mine: int, saved: int, dp: int, was: int
) -> None:
    here, there = state.Layout(dp, dp, 1, 1, mine), state.Layout(was, was, 1, 1, saved)
    partitioned = (mine != saved and 3 in (mine, saved)) or (mine == 3 and dp != was)
    assert bool(here.problems(vars(there), weights_only=True)) == partitioned
    assert bool(here.problems(vars(there))) == (mine != saved or (mine > 0 and dp != was))
