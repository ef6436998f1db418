"""prepare_data.py: same tokens from every format, killed runs go on, nothing is lost or overwritten."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prepare_data
import pytest
from pretraining.indexed_file import open_indexed, token_dtype
from pretraining.tokenizers import ByteLevelTokenizer

SCRIPT = Path(prepare_data.__file__)
SUFFIXES = (".bin", ".idx", ".json")


def documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["word", "größer", "日本", "x = 1\n", "", "🙂"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) + f" {index}" for index in range(count)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def run(prefix: Path, *inputs: Path, **options: object) -> int:
    argv = ["--input", *map(str, inputs), "--output-prefix", str(prefix)]
    options.setdefault("workers", 2)
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    return prepare_data.main(argv)


def read(prefix: Path) -> list[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(f"{prefix}_text_document")
    tokenizer = ByteLevelTokenizer()
    texts = []
    for index in range(len(dataset)):
        ids = dataset[index]
        assert ids[-1] == tokenizer.eod
        texts.append(tokenizer.detokenize(ids))
    return texts


def content(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.mark.parametrize("block_megabytes", [0.0005, 16])
def test_all_formats_give_the_same_tokens(tmp_path, block_megabytes):
    texts = documents(100)
    paragraphs = [text.replace("\n", " ").strip() for text in texts]
    files = {
        "a.jsonl": lines(texts),
        "a.jsonl.gz": gzip.compress(lines(texts[:40])) + gzip.compress(lines(texts[40:])),
        "a.jsonl.xz": lzma.compress(lines(texts)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert run(tmp_path / f"out-{name}", tmp_path / name, block_megabytes=block_megabytes) == 0
        assert read(tmp_path / f"out-{name}") == texts
    for mode, separator in (("paragraph", "\n \n"), ("line", "\n")):
        for suffix, pack in ((".txt", bytes), (".txt.gz", gzip.compress), (".txt.xz", lzma.compress)):
            path = tmp_path / (mode + suffix)
            path.write_bytes(pack(separator.join(paragraphs).encode()))
            prefix = tmp_path / f"out-{mode}{suffix}"
            assert run(prefix, path, block_megabytes=block_megabytes, text_document=mode) == 0
            assert read(prefix) == paragraphs


def test_a_text_file_is_one_document_and_folders_are_searched_in_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second\n\nstill second")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (folder / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (folder / "image.png").write_bytes(b"no text")
    assert run(tmp_path / "out", folder) == 0
    assert read(tmp_path / "out") == ["first", "second\n\nstill second", "third"]


def test_files_equal_those_of_megatron_core(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = documents(50)
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    assert run(tmp_path / "ours", tmp_path / "a.jsonl", block_megabytes=0.001) == 0
    tokenizer = ByteLevelTokenizer()
    assert DType.optimal_dtype(tokenizer.vocab_size) is token_dtype(tokenizer.vocab_size).type
    assert DType.optimal_dtype(65500) is token_dtype(65500).type
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        builder.add_item(torch.tensor([*tokenizer.tokenize(text), tokenizer.eod]))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == content(tmp_path / "ours")[suffix]


def test_the_number_of_workers_changes_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(documents(300)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(documents(200, seed=1))))
    for workers in (1, 3):
        prefix = tmp_path / f"out{workers}"
        assert (
            run(prefix, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", workers=workers, block_megabytes=0.002)
            == 0
        )
    assert content(tmp_path / "out1") == content(tmp_path / "out3")


def test_killed_runs_go_on_to_the_same_result(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(documents(20000)) + b"bad\n")
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines(documents(4000, seed=1)), preset=0))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.xz"]
    assert run(tmp_path / "whole", *inputs, block_megabytes=0.02) == 0

    prefix = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), "--input", *map(str, inputs), "--output-prefix", str(prefix)]
    command += ["--workers", "2", "--block-megabytes", "0.02"]
    parts = Path(f"{prefix}_text_document.parts")
    kills = 0
    for wanted in (1, 20, 60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(parts.glob("*-*.json"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            assert not Path(f"{prefix}_text_document.json").exists()
    assert kills >= 2
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("*-*.json")}
    assert kept
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    assert content(prefix) == content(tmp_path / "whole")
    assert not parts.exists()


def test_finished_parts_are_not_made_again(tmp_path, monkeypatch):
    import pretraining.prepare as prepare

    (tmp_path / "a.jsonl").write_bytes(lines(documents(200)))
    real, done = prepare._run, []

    def stop_after_three(job, blocks, workers, count):
        for block in list(blocks)[:3]:
            count(prepare.encode_block(job, block))
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_run", stop_after_three)
    assert run(tmp_path / "out", tmp_path / "a.jsonl", block_megabytes=0.002) == prepare_data.INTERRUPTED_EXIT

    def note(job, blocks, workers, count):
        blocks = list(blocks)
        done.extend(block.number for block in blocks)
        real(job, iter(blocks), workers, count)

    monkeypatch.setattr(prepare, "_run", note)
    assert run(tmp_path / "out", tmp_path / "a.jsonl", block_megabytes=0.002) == 0
    assert done == list(range(3, len(done) + 3))
    assert read(tmp_path / "out") == documents(200)


def test_bad_lines_are_counted_named_and_kept(tmp_path, capsys):
    bad = {
        2: (b"{not json}", "not JSON"),
        4: (b'{"other": "x"}', "no key 'text'; it has 'other'"),
        5: (b'{"text": 5}', "'text' is a int"),
        7: (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        8: (b'["text"]', "a JSON list"),
        9: (b'{"text": "\\ud800"}', "half a surrogate"),
    }
    good = [json.dumps({"text": f"good {index}"}).encode() for index in range(5)]
    rows = [bad[line][0] if line in bad else good.pop() for line in range(1, 10)]
    rows += [b"", b'{"text": ""}', good.pop()]
    assert not good[1:]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    assert run(tmp_path / "out", tmp_path / "a.jsonl", block_megabytes=0.00003) == 0
    assert read(tmp_path / "out") == ["good 4", "good 3", "good 2", "good 1"]
    entries = [
        json.loads(row)
        for row in Path(f"{tmp_path}/out_text_document.rejected.jsonl").read_text().splitlines()
    ]
    assert [entry["line"] for entry in entries] == list(bad)
    for entry in entries:
        raw, reason = bad[entry["line"]]
        assert base64.b64decode(entry["raw_base64"]).rstrip(b"\n") == raw
        assert reason in entry["reason"]
    printed = capsys.readouterr()
    assert "left out 6 bad lines" in printed.err
    assert f"{tmp_path}/a.jsonl:7: invalid UTF-8" in printed.err
    assert "1 empty documents" in printed.out
    sidecar = json.loads(Path(f"{tmp_path}/out_text_document.json").read_text())
    assert (sidecar["bad_lines"], sidecar["empty_documents"]) == (6, 1)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".txt.gz"])
def test_a_truncated_stream_keeps_what_came_before_and_names_the_rest(tmp_path, suffix):
    texts = documents(500)
    data = lines(texts) if "jsonl" in suffix else "\n".join(text.replace("\n", "") for text in texts).encode()
    pack = gzip.compress if suffix.endswith("gz") else lzma.compress
    packed = pack(data)
    (tmp_path / f"a{suffix}").write_bytes(packed[: len(packed) // 2])
    assert run(tmp_path / "out", tmp_path / f"a{suffix}", block_megabytes=0.002, text_document="line") == 0
    found = read(tmp_path / "out")
    whole = texts if "jsonl" in suffix else [text.replace("\n", "") for text in texts]
    assert found == whole[: len(found)]
    (entry,) = map(json.loads, Path(f"{tmp_path}/out_text_document.rejected.jsonl").read_text().splitlines())
    assert "ends early" in entry["reason"]
    assert entry["line"] == len(found) + 1
    rest = base64.b64decode(entry["raw_base64"])
    assert data[entry["offset"] :].startswith(rest)


def test_too_many_bad_lines_stop_and_a_larger_limit_goes_on(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]) + b"bad\n" * 5)
    assert run(tmp_path / "out", tmp_path / "a.jsonl", max_bad_lines=4) == 2
    assert "5 bad lines, more than --max-bad-lines 4" in capsys.readouterr().err
    assert not Path(f"{tmp_path}/out_text_document.bin").exists()
    assert run(tmp_path / "out", tmp_path / "a.jsonl", max_bad_lines=5) == 0


def test_only_bad_lines_end_with_status_two_and_write_nothing(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    assert run(tmp_path / "out", tmp_path / "a.jsonl", json_key="content") == 2
    assert "no key 'content'; it has 'text'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_nothing_is_overwritten(tmp_path, capsys):
    source, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_bytes(lines(["one"]))
    other.write_bytes(lines(["two"]))
    assert run(tmp_path / "out", source) == 0
    before = content(tmp_path / "out")
    assert run(tmp_path / "out", source) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(tmp_path / "out", other) == 2
    assert "different: inputs" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    assert run(tmp_path / "out", other, overwrite=True) == 0
    assert read(tmp_path / "out") == ["two"]


def test_files_of_another_program_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / "out_text_document.bin").write_bytes(b"precious")
    assert run(tmp_path / "out", tmp_path / "a.jsonl") == 2
    assert "exists; choose another prefix" in capsys.readouterr().err
    assert (tmp_path / "out_text_document.bin").read_bytes() == b"precious"


def test_parts_of_a_run_with_other_arguments_are_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]) + b"bad\n")
    assert run(tmp_path / "out", tmp_path / "a.jsonl", max_bad_lines=0) == 2
    assert run(tmp_path / "out", tmp_path / "a.jsonl", no_append_eod=True) == 2
    assert "unfinished run with other arguments" in capsys.readouterr().err
    assert run(tmp_path / "out", tmp_path / "a.jsonl", no_append_eod=True, overwrite=True) == 0
    assert open_indexed(f"{tmp_path}/out_text_document").num_tokens == 3


def test_two_runs_at_once_are_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    parts = tmp_path / "out_text_document.parts"
    parts.mkdir()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(parts / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        assert run(tmp_path / "out", tmp_path / "a.jsonl") == 2
        assert "another prepare_data.py" in capsys.readouterr().err
        holder.communicate(b"\n")
    assert run(tmp_path / "out", tmp_path / "a.jsonl") == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.jsonl", "No such file"), ("data.csv", "unknown suffix"), ("empty", "the folder holds no")],
)
def test_wrong_inputs_are_named(tmp_path, capsys, name, message):
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "out", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert message in error and name in error and error.count("\n") == 1


def test_the_same_file_twice_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    os.symlink(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert run(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl") == 2
    assert "given twice" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_message(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "out", tmp_path / "a.jsonl") == 2
    error = capsys.readouterr().err
    assert "Not a directory" in error and error.count("\n") == 1


def test_a_full_disk_in_a_worker_is_one_message_and_keeps_the_parts(tmp_path, capsys, monkeypatch):
    import errno

    import pretraining.prepare as prepare

    (tmp_path / "a.jsonl").write_bytes(lines(documents(100)))
    real = prepare.encode_block

    def full(job, block):
        if block.number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(job, block)

    monkeypatch.setattr(prepare, "encode_block", full)  # the workers are forked and inherit it
    assert run(tmp_path / "out", tmp_path / "a.jsonl", block_megabytes=0.002, workers=1) == 2
    assert "No space left on device; the finished parts are kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(tmp_path / "out", tmp_path / "a.jsonl", block_megabytes=0.002) == 0
    assert read(tmp_path / "out") == documents(100)


def test_a_killed_worker_is_one_message(tmp_path, capsys, monkeypatch):
    import pretraining.prepare as prepare

    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    monkeypatch.setattr(prepare, "encode_block", lambda job, block: os.kill(os.getpid(), signal.SIGKILL))
    assert run(tmp_path / "out", tmp_path / "a.jsonl") == 2
    assert "a worker process was killed" in capsys.readouterr().err


def test_large_vocabularies_use_four_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["1 70000", "7"]))
    options = {"tokenizer_type": "NullTokenizer", "vocab_size": 80000}
    assert run(tmp_path / "out", tmp_path / "a.jsonl", **options) == 0
    file = open_indexed(f"{tmp_path}/out_text_document")
    assert file.dtype == np.int32
    assert np.fromfile(f"{tmp_path}/out_text_document.bin", np.int32).tolist() == [1, 70000, 80000, 7, 80000]
    assert file.max_token() == 80000
