"""The rules of the code base hold in every file, and each rule finds what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import house_rules as rules
import pytest
from house_rules import PRODUCT, ROOT, Module

EVERYWHERE = (*PRODUCT, "tests", "docs")
TEXT_SUFFIXES = {".py", ".sh", ".md", ".json", ".toml", ".yaml", ".cpp", ".cu", ".h", ".cuh", ".sbatch", ""}


def _findings(rule: Callable[[Module], Iterator[str]], *folders: str) -> list[str]:
    found = rules.modules(*folders)
    assert len(found) > 10
    return [finding for module in found for finding in rule(module)]


@pytest.mark.parametrize(
    ("rule", "folders"),
    [
        (rules.long_files, EVERYWHERE),
        (rules.long_functions, EVERYWHERE),
        (rules.undocumented, PRODUCT),
        (rules.wrong_way, PRODUCT),
        (rules.deepspeed_internals, PRODUCT),
        (rules.megatron_internals, PRODUCT),
        (rules.global_random, PRODUCT),
        (rules.pickles, PRODUCT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_file_keeps_the_rule(rule: Callable[[Module], Iterator[str]], folders: tuple[str, ...]) -> None:
    assert _findings(rule, *folders) == []


def _texts() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file() and not path.name.endswith(".lock"))
    for folder in (*EVERYWHERE, "ds_configs", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            generated = {"_build", "_generated", "__pycache__"} & set(path.parts)
            if path.is_file() and path.suffix in TEXT_SUFFIXES and not generated:
                yield path


def test_no_file_mentions_a_private_path_or_a_registry() -> None:
    paths = sorted(_texts())
    assert len(paths) > 100
    found = [
        finding
        for path in paths
        if path.name not in (".git", "house_rules.py", "test_house_rules.py")
        for finding in rules.private_text(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (rules.long_files, "ds_efficient/a.py", "x = 1\n" * 401),
        (rules.long_functions, "ds_efficient/a.py", "def f():\n" + "    x = 1\n" * 60),
        (rules.undocumented, "ds_efficient/a.py", '"""A."""\nclass A:\n    """B."""\n    def f(self): ...\n'),
        (rules.undocumented, "ds_efficient/a.py", "x = 1\n"),
        (rules.wrong_way, "ds_efficient/slope/maths.py", "from ds_efficient.rmm import config"),
        (rules.wrong_way, "ds_efficient/slope/maths.py", "def f():\n    import ds_efficient.core.engine"),
        (rules.wrong_way, "ds_efficient/ops/a.py", "from ds_efficient.slope.config import SlopeConfig"),
        (rules.wrong_way, "ds_efficient/core/engine.py", "import megatron_patches"),
        (rules.wrong_way, "ds_efficient/core/engine.py", "from ds_efficient.report import runlog"),
        (rules.wrong_way, "megatron_patches/mpu.py", "from pretraining.model import build_model"),
        (rules.wrong_way, "ds_efficient/core/plan.py", "import ds_efficient"),
        (rules.deepspeed_internals, "launch/a.py", "from deepspeed.runtime.engine import DeepSpeedEngine"),
        (rules.deepspeed_internals, "launch/a.py", "import deepspeed\ndeepspeed.comm.barrier()"),
        (
            rules.deepspeed_internals,
            "ds_efficient/core/deepspeed_compat.py",
            "import deepspeed.ops.random_ltd",
        ),
        (rules.megatron_internals, "ds_efficient/core/a.py", "from megatron.core import parallel_state"),
        (rules.megatron_internals, "launch/a.py", "from megatron.core.optimizer import x"),
        (rules.global_random, "ds_efficient/a.py", "torch.randn(3)"),
        (rules.global_random, "ds_efficient/a.py", "weight.normal_()"),
        (rules.global_random, "ds_efficient/a.py", "np.random.rand(3)"),
        (rules.global_random, "ds_efficient/a.py", "random.shuffle(x)"),
        (rules.pickles, "ds_efficient/a.py", "import pickle\npickle.loads(x)"),
        (rules.pickles, "ds_efficient/a.py", "from pickle import load"),
        (rules.pickles, "ds_efficient/a.py", "import dill"),
        (rules.pickles, "ds_efficient/a.py", "torch.load(path)"),
        (rules.pickles, "ds_efficient/a.py", "np.load(path, allow_pickle=True)"),
    ],
)
def test_each_rule_finds_what_it_forbids(
    rule: Callable[[Module], Iterator[str]], path: str, source: str
) -> None:
    assert list(rule(Module(path, source)))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (
            rules.wrong_way,
            "ds_efficient/slope/technique.py",
            "from ds_efficient.core.technique import Action",
        ),
        (rules.wrong_way, "ds_efficient/core/plan.py", "from ds_efficient.config import EfficiencyConfig"),
        (
            rules.wrong_way,
            "ds_efficient/core/technique.py",
            "if TYPE_CHECKING:\n    from ds_efficient.core.engine import initialize",
        ),
        (rules.wrong_way, "launch/pretraining/model.py", "import ds_efficient\nimport megatron_patches"),
        (rules.deepspeed_internals, "launch/a.py", "import deepspeed\nprint(deepspeed.__version__)"),
        (rules.megatron_internals, "launch/a.py", "from megatron.core.models.gpt import GPTModel"),
        (
            rules.global_random,
            "ds_efficient/a.py",
            "torch.randn(3, generator=own)\nnp.random.Generator(bits)",
        ),
        (rules.pickles, "ds_efficient/a.py", "torch.load(path, weights_only=True)"),
        (rules.pickles, "ds_efficient/a.py", "import pickle\nerrors = (pickle.UnpicklingError,)"),
    ],
)
def test_what_is_allowed_passes(rule: Callable[[Module], Iterator[str]], path: str, source: str) -> None:
    assert list(rule(Module(path, source))) == []


@pytest.mark.parametrize(
    "parts", [("/home", "/me/x"), ("see ", "https://", "py", "pi.org/x"), ("/wo", "rk/a")]
)
def test_private_text_is_found(parts: tuple[str, ...]) -> None:
    assert list(rules.private_text("a.md", "".join(parts)))
    assert not list(rules.private_text("a.md", "a/home/work and /tmp/run"))


def test_the_techniques_of_the_layers_are_those_of_the_table() -> None:
    from ds_efficient.registry import TECHNIQUES

    assert {row.name for row in TECHNIQUES} == set(rules.TECHNIQUES)
