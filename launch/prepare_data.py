"""Turn text into the indexed dataset that pretrain_gpt.py reads.

    python launch/prepare_data.py --input a.jsonl b.jsonl.gz notes.txt folder/ --output-prefix data/corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --workers 8

writes data/corpus_text_document.bin, .idx and .json. Stopped at any time, the same command goes on where it
was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

# The workers are the parallelism; threads inside each would only compete. Read by the library at first use.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pretraining.assemble import Output, Summary, assemble, run_arguments
from pretraining.prepare import Job, encode_inputs
from pretraining.text_input import SUFFIXES, TEXT_DOCUMENTS, find_inputs
from pretraining.tokenizers import TOKENIZER_TYPES, build_tokenizer

from ds_efficient.errors import USER_ERROR_EXIT, UserError

INTERRUPTED_EXIT = 130


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Turn text into megatron-core's indexed dataset. Stopped, the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=f"files ({', '.join(SUFFIXES)}) or folders")
    add("--output-prefix", required=True, metavar="PREFIX", help="PREFIX_text_document.{bin,idx,json}")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default="ByteLevelTokenizer", help="tokenizer")
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json or SentencePiece model")
    add("--vocab-size", type=int, help="ids of the NullTokenizer")
    add("--eod-token", help="end-of-document token, where the well-known names are not in the vocabulary")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents by that token",
    )
    add("--json-key", default="text", help="key of the text in a line of JSON")
    add("--text-document", choices=TEXT_DOCUMENTS, default="file", help="what is a document in a .txt")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add("--max-bad-lines", type=int, default=None, help="stop above so many; unlimited if not given")
    add("--block-megabytes", type=float, default=16.0, help="text of one unit of work")
    add("--overwrite", action="store_true", help="replace an existing dataset or the parts of another run")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Do what the arguments say and print the result."""
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if args.max_bad_lines is not None and args.max_bad_lines < 0:
        raise UserError(f"--max-bad-lines {args.max_bad_lines}: must not be negative")
    block_bytes = int(args.block_megabytes * 1e6)
    if block_bytes < 1:
        raise UserError(f"--block-megabytes {args.block_megabytes}: must be above 0")
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size, args.eod_token)
    inputs, skipped = find_inputs(args.input, args.text_document)
    if skipped:
        print(f"passed over {len(skipped)} files of other suffixes, first {skipped[0]}")
    arguments = run_arguments(
        tokenizer,
        inputs,
        append_eod=args.append_eod,
        json_key=args.json_key,
        text_document=args.text_document,
        block_bytes=block_bytes,
    )
    output = Output(args.output_prefix, arguments)
    if not output.open(args.overwrite):
        print(f"{output.name}: complete already, with the same arguments and inputs; nothing to do")
        return
    begin = time.monotonic()
    job = Job(output.parts, tokenizer, args.append_eod, args.json_key)
    encode_inputs(job, inputs, block_bytes=block_bytes, workers=args.workers, max_bad=args.max_bad_lines)
    summary = assemble(output, tokenizer, len(inputs))
    _report(output, summary, time.monotonic() - begin)


def _report(output: Output, summary: Summary, seconds: float) -> None:
    facts = summary.facts
    print(
        f"{output.name}.bin/.idx: {facts['documents']} documents, {facts['tokens']} tokens of "
        f"{facts['text_bytes'] / 1e6:.1f} MB text in {seconds:.1f} s"
    )
    if facts["empty_documents"]:
        print(f"left out {facts['empty_documents']} empty documents")
    if facts["bad_lines"]:
        print(
            f"WARNING: left out {facts['bad_lines']} bad lines; all are in {output.rejected}", file=sys.stderr
        )
        for line in summary.first_bad:
            print(f"  {line}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's error is one message and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        prepare(args)
    except UserError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except OSError as error:
        where = error.filename or args.output_prefix
        print(f"prepare_data.py: {where}: {error.strerror or error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("prepare_data.py: stopped; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
