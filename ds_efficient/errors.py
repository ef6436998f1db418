"""Errors that a user can cause. The commands print them as one message and exit with status 2."""

from __future__ import annotations

from collections.abc import Sequence

USER_ERROR_EXIT = 2


class UserError(Exception):
    """Something the user asked for that cannot be done.

    The message names the key or argument, its value, what is allowed and the remedy.
    """


class ConfigError(UserError, ValueError):
    """The configuration is wrong; carries every problem found, not only the first.

    Args:
        source: name of the configuration (a path, or ``"config"`` for a dict).
        problems: one line each, ``path: what is wrong; what is allowed``.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{source}: {count} problem{'' if count == 1 else 's'}"]
        super().__init__("\n  ".join(lines + self.problems))


class InactiveTechnique(UserError, RuntimeError):  # noqa: N818 (the public name)
    """A technique is enabled but did nothing in the first steps; the run stops instead of going on."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, truncated, or belongs to another model or configuration."""


class OpBuildError(UserError, RuntimeError):
    """A kernel cannot be built or loaded here; says why and what to do."""


class UnsupportedVersion(UserError, RuntimeError):  # noqa: N818
    """An installed package is older than, or unknown to, the versions this project supports."""
