"""The corpus from the standard library: complete, deterministic, without overlap, never overwritten."""

from __future__ import annotations

import json

import build_corpus
import pytest
from pretraining.tokenizers import build_tokenizer

NAMES = ["corpus.json", "tokenizer.json", "train.jsonl", "valid.jsonl"]


def run(folder, *options: str) -> int:
    return build_corpus.main(
        ["--output-dir", str(folder), "--max-megabytes", "1", "--vocab-size", "400", *options]
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    assert run(folder) == 0
    return folder


def test_the_corpus_is_complete_and_says_so(corpus):
    assert sorted(path.name for path in corpus.iterdir()) == NAMES
    facts = json.loads((corpus / "corpus.json").read_text())
    for part in ("train", "valid"):
        rows = [json.loads(row) for row in (corpus / f"{part}.jsonl").read_text().splitlines()]
        assert len(rows) == facts[part]["documents"] > 0
        assert sum(len(row["text"].encode()) for row in rows) == facts[part]["bytes"]
    assert 900_000 < facts["train"]["bytes"] + facts["valid"]["bytes"] <= 1_000_000
    tokenizer = build_tokenizer("HuggingFaceTokenizer", corpus, None)
    assert tokenizer.vocab_size == 400


def test_no_text_is_in_both_parts(corpus):
    train, valid = (
        [json.loads(row) for row in (corpus / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "valid")
    )
    for key in ("text", "source"):
        values = [row[key] for row in train + valid]
        assert len(set(values)) == len(values)


def test_built_again_it_is_the_same(corpus, tmp_path):
    assert run(tmp_path / "again") == 0
    for name in NAMES:
        assert (tmp_path / "again" / name).read_bytes() == (corpus / name).read_bytes()


def test_a_complete_corpus_is_kept(corpus, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in corpus.iterdir()}
    assert run(corpus) == 0
    assert "complete already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in corpus.iterdir()} == before


def test_files_of_the_user_and_other_corpora_are_not_overwritten(corpus, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    assert run(tmp_path) == 2
    assert "not of this corpus" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == "mine"
    assert run(corpus, "--valid-percent", "7") == 2
    assert run(tmp_path, "--overwrite") == 0


def test_a_broken_off_corpus_is_finished(corpus, tmp_path):
    (tmp_path / "corpus.unfinished").touch()
    (tmp_path / "train.jsonl").write_text("half")
    assert run(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    assert (tmp_path / "train.jsonl").read_bytes() == (corpus / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "10"], "must be at least 257"),
        (["--valid-percent", "60"], "must be above 0 and below 50"),
        (["--max-megabytes", "0.01"], "too small"),
    ],
)
def test_wrong_arguments_are_one_message(tmp_path, capsys, options, message):
    assert run(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
