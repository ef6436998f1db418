"""Sub-commands of ``ds_efficient``: one module each, with ``add_parser`` and ``run``."""
