"""``ds_efficient export``: write a checkpoint as a model for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face model",
        description="Write a checkpoint of pretrain_gpt.py, saved on any layout, as a Hugging Face model in "
        "safetensors: Llama, Qwen2, Qwen3 or GPT-2, whichever computes the same.",
    )
    parser.add_argument("kind", choices=("hf",), help="for transformers")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder that --save named, or a checkpoint in it"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--tag", metavar="NAME", help="name of the checkpoint, as in global_step1000; the latest"
    )
    parser.add_argument(
        "--format",
        choices=("dense", "sparse"),
        default="dense",
        help="dense: pruned weights are zeros; sparse: kept values and masks, for "
        "ds_efficient.export.load_sparse; default: dense",
    )
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--merge-adapters",
        action="store_const",
        const=True,
        dest="merge_adapters",
        help="add active low-rank adapters to the weights, which makes them dense; the default with dense",
    )
    adapters.add_argument(
        "--separate-adapters",
        action="store_const",
        const=False,
        dest="merge_adapters",
        help="keep them apart; the default with sparse",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the tensors; default: the run's precision"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export; 0.

    Raises:
        UserError: the checkpoint, the model or the folder does not allow it.
    """
    from ds_efficient.export.hugging_face import export_hf

    done = export_hf(
        args.checkpoint,
        args.out,
        tag=args.tag,
        format=args.format,
        merge_adapters=args.merge_adapters,
        dtype=args.dtype,
    )
    size = done.total_bytes / 2**20
    print(f"{done.folder}: {done.architecture}, {size:,.1f} MiB in {len(done.files)} file(s)")
    if done.sparse_layers:
        print(f"{done.sparse_layers} linear layers were trained sparse")
    for note in done.notes:
        print(f"note: {note}")
    return 0
