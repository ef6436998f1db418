"""Tokenizers: exact round trips, end of document, and errors that name what is wrong."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining.corpus import END_OF_TEXT, train_tokenizer
from pretraining.tokenizers import NO_PAD, ByteLevelTokenizer, build_tokenizer

from ds_efficient.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n", "Größe, 日本語, 🙂🙂", "a b  c\t\n\n", "the cat and the hat " * 20]
UNICODE = st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=200)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    with open(folder / "tokenizer.json", "wb") as stream:
        train_tokenizer(stream, TEXTS * 3, 300)
    return folder


@given(UNICODE)
@settings(deadline=None, max_examples=200)
def test_bytes_round_trip_every_text(text):
    tokenizer = ByteLevelTokenizer()
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == text
    assert ids.tobytes() == text.encode("utf-8")


@given(UNICODE)
@settings(deadline=None, max_examples=200)
def test_byte_level_bpe_round_trips_every_text(bpe, text):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", bpe, None)
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.eod not in ids
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size


LINES = st.lists(st.text(alphabet="ab ;\t\r\nüx'", max_size=12), max_size=60).map("\n".join)


@given(LINES)
@settings(deadline=None, max_examples=200)
def test_long_texts_in_pieces_have_the_same_ids(bpe, text):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", bpe, None)
    whole = tokenizer.tokenize(text)
    tokenizer.long_text = 20
    np.testing.assert_array_equal(tokenizer.tokenize(text), whole)


def test_long_texts_are_not_cut_where_that_would_change_ids(bpe, tmp_path):
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path, None)
    text = "the cat\nand the hat\n" * 20
    whole = tokenizer.tokenize(text)
    tokenizer.long_text = 20
    np.testing.assert_array_equal(tokenizer.tokenize(text), whole)


def test_long_texts_are_encoded_in_pieces(bpe):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", bpe, None)
    tokenizer.long_text = 100
    text = "the cat\nand the hat\n" * 50
    assert tokenizer._cut(text, 0) < 150


def test_a_document_cannot_forge_the_end_of_document(bpe):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", bpe / "tokenizer.json", None)
    text = f"before {END_OF_TEXT} after"
    ids = tokenizer.tokenize(text)
    assert tokenizer.eod not in ids
    assert tokenizer.detokenize(ids) == text


def test_truncation_stored_in_the_file_loses_nothing(bpe, tmp_path):
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path, None)
    assert tokenizer.detokenize(tokenizer.tokenize(TEXTS[0])) == TEXTS[0]


def test_holes_in_the_vocabulary_count(bpe, tmp_path):
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["model"]["vocab"]["unused-but-high"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path, None).vocab_size == 1000


def test_training_a_tokenizer_is_deterministic():
    first, second = io.BytesIO(), io.BytesIO()
    train_tokenizer(first, TEXTS, 290)
    train_tokenizer(second, TEXTS, 290)
    assert first.getvalue() == second.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    library = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sp") / "sp.model"
    with open(path, "wb") as stream:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 5),
            model_writer=stream,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


@given(UNICODE.filter(lambda text: "▁" not in text and "\0" not in text))
@settings(deadline=None, max_examples=100)
def test_sentencepiece_with_identity_normalisation_round_trips(sentencepiece_model, text):
    tokenizer = build_tokenizer("SentencePieceTokenizer", sentencepiece_model, None)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_sentencepiece_takes_eos_or_the_token_asked_for(sentencepiece_model):
    assert build_tokenizer("SentencePieceTokenizer", sentencepiece_model, None).eod == 2
    assert build_tokenizer("SentencePieceTokenizer", sentencepiece_model, None, "<s>").eod == 1
    with pytest.raises(UserError, match="--eod-token <none>: not in the vocabulary"):
        build_tokenizer("SentencePieceTokenizer", sentencepiece_model, None, "<none>")


def test_null_tokenizer_reads_numbers():
    tokenizer = build_tokenizer("NullTokenizer", None, 100)
    assert tokenizer.tokenize("1 2\n99").tolist() == [1, 2, 99]
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    with pytest.raises(ValueError, match="outside"):
        tokenizer.tokenize("100")


def test_identity_tells_models_apart_and_is_json(bpe, tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as stream:
        train_tokenizer(stream, ["quite other words"], 300)
    one = build_tokenizer("HuggingFaceTokenizer", bpe, None)
    other = build_tokenizer("HuggingFaceTokenizer", tmp_path, None)
    assert json.loads(json.dumps(one.identity())) == one.identity() != other.identity()
    assert one.pad == ByteLevelTokenizer().pad == NO_PAD


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("WordTokenizer", None, None), "must be one of ByteLevelTokenizer"),
        (("HuggingFaceTokenizer", None, None), "needs the path"),
        (("HuggingFaceTokenizer", "{missing}", None), "No such file"),
        (("HuggingFaceTokenizer", "{text}", None), "not a tokenizer.json"),
        (("HuggingFaceTokenizer", "{empty}", None), "is empty"),
        (("SentencePieceTokenizer", "{text}", None), "not a SentencePiece model"),
        (("ByteLevelTokenizer", "{text}", None), "has no model; did you mean"),
        (("ByteLevelTokenizer", None, 300), "--vocab-size 300: ByteLevelTokenizer has 257 ids"),
        (("NullTokenizer", None, None), "NullTokenizer needs it"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, arguments, message):
    (tmp_path / "text").write_text("no tokenizer")
    (tmp_path / "empty").touch()
    kind, model, size = arguments
    path = model and tmp_path / model.strip("{}")
    with pytest.raises(UserError, match=message):
        build_tokenizer(kind, path, size)


def test_missing_end_of_document_names_the_candidates(bpe, tmp_path):
    content = (bpe / "tokenizer.json").read_text().replace(END_OF_TEXT, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"none of <\|endoftext\|>, </s>.*--eod-token"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path, None)
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path, None, "<|other|>").eod == 0


def test_batches_equal_single_texts(bpe):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", bpe, None)
    for text, ids in zip(TEXTS, tokenizer.tokenize_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.tokenize(text))
