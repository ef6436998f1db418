"""Installation; the metadata is in pyproject.toml. Kernels are compiled at first use, not here."""

from setuptools import setup

setup()
