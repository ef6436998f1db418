"""``python -m ds_efficient`` is the ``ds_efficient`` command."""

import sys

from ds_efficient.cli import main

sys.exit(main())
