"""What ranks of a `RankPool` do in the test of ``train_hf_gpt2.py``."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence


def train(argv: Sequence[str]) -> tuple[int, str]:
    """Run the script in this rank; return its exit status and standard output."""
    import train_hf_gpt2

    sys.argv = ["train_hf_gpt2.py", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = train_hf_gpt2.main()
    return status, output.getvalue()
