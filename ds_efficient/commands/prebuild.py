"""``ds_efficient prebuild``: build native ops ahead of the run, on one node, for any GPUs."""

from __future__ import annotations

import argparse
import logging

from ds_efficient.errors import OpBuildError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "prebuild",
        help="build native ops ahead of the run",
        description="Build native ops into the cache (TORCH_EXTENSIONS_DIR, by default a folder of the "
        "user's cache). Without names and --arch: every op that this machine can build.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help='for example "keyed_random"; default: all')
    parser.add_argument(
        "--arch",
        metavar="LIST",
        help='CUDA architectures, as in "8.0;9.0a"; default: TORCH_CUDA_ARCH_LIST, else the visible GPUs',
    )
    parser.add_argument(
        "--clean-stale-locks",
        action="store_true",
        help="first remove the locks of builds that were killed, those of torch's own JIT builds included",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build; 0 when everything asked for is there.

    Raises:
        OpBuildError: an op is unknown, or one that was asked for cannot be built (after all were tried).
    """
    from ds_efficient.op_builder import compile as compiler
    from ds_efficient.op_builder import inventory
    from ds_efficient.op_builder.all_ops import select_ops
    from ds_efficient.op_builder.arch import parse_arch_list

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    specs = select_ops(args.ops)
    archs = parse_arch_list(args.arch, source="--arch") if args.arch else None
    if args.clean_stale_locks:
        removed = inventory.clean_stale_locks()
        for line in removed:
            print(f"removed the stale lock {line}", flush=True)
        if not removed:
            print("no stale locks", flush=True)
    failures = []
    for number, spec in enumerate(specs, start=1):
        head = f"[{number}/{len(specs)}] {spec.full_name}"
        cuda = spec.device == "cuda"
        if cuda and not args.ops and archs is None:
            reason = compiler.why_not(spec)
            if reason is not None:
                print(f"{head}: left out: {reason}", flush=True)
                continue
        print(f"{head}: building ...", flush=True)
        try:
            built = compiler.build(spec, archs=archs if cuda else None)
        except OpBuildError as error:
            failures.append(str(error))
            print(f"{head}: failed", flush=True)
            continue
        done = f"built in {built.seconds:.1f} s" if built.fresh else "already there"
        print(f"{head}: {done}: {built.path}", flush=True)
    if failures:
        raise OpBuildError("\n".join(failures))
    return 0
