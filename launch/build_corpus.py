"""Build a corpus and a tokenizer from the standard library of the running Python; nothing is downloaded.

    python launch/build_corpus.py --output-dir data

writes data/train.jsonl, data/valid.jsonl (one document a file), data/tokenizer.json and data/corpus.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretraining.corpus import CorpusFiles, build

from ds_efficient.errors import USER_ERROR_EXIT, UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="build_corpus.py",
        description="Corpus and tokenizer from the running Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder of the four files")
    add("--max-megabytes", type=float, default=12.0, help="most text, in MB of UTF-8")
    add("--vocab-size", type=int, default=4096, help="ids of the tokenizer, special token included")
    add("--valid-percent", type=float, default=5.0, help="share of the files kept for validation")
    add("--overwrite", action="store_true", help="replace an existing corpus")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's error is one message and exit status 2."""
    args = build_parser().parse_args(argv)
    folder = Path(args.output_dir)
    try:
        facts = build(
            folder,
            max_megabytes=args.max_megabytes,
            vocab_size=args.vocab_size,
            valid_percent=args.valid_percent,
            overwrite=args.overwrite,
            say=lambda text: print(text, flush=True),
        )
    except UserError as error:
        print(f"build_corpus.py: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except OSError as error:
        print(f"build_corpus.py: {error.filename or folder}: {error.strerror or error}", file=sys.stderr)
        return USER_ERROR_EXIT
    files = CorpusFiles(folder)
    for path, part in ((files.train, facts["train"]), (files.valid, facts["valid"])):
        print(f"{path}: {part['documents']} documents, {part['bytes'] / 1e6:.1f} MB")
    print(f"{files.tokenizer}: {facts['arguments']['vocab_size']} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
