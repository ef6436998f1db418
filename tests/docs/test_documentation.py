"""What README and the documentation say can be run, read and found."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from house_rules import ROOT

from ds_efficient.cli import COMMANDS
from ds_efficient.cli import build_parser as build_command_parser

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if not {"_generated", "_build"} & set(p.parts)),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
_PATH = re.compile(r"(?<![\w/.-])(?:launch|tests|docs|ds_configs|ds_efficient|megatron_patches)/[\w./-]*\w")
# Places that a run or a build makes.
_MADE = ("docs/_build", "docs/_generated")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of a page in these languages."""
    return [body for language, body in _BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield every shell command of a page, split into words, comments left out."""
    for block in blocks(page, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def test_readme_has_the_two_commands_alone_in_a_block_each() -> None:
    shell = blocks(ROOT / "README.md", "bash")
    assert shell[0] == "bash launch/quickstart.sh\n"
    assert shell[1] == "bash tests/run.sh\n"


def test_ci_runs_the_test_command_of_the_readme_and_nothing_weaker() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "set -euo pipefail"
    assert lines[-1] == "exec bash tests/run.sh"
    assert len(lines) == 3  # and a cd


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "tests/run.sh"])
def test_the_two_scripts_are_sound_and_explain_themselves(script: str) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "--help"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("Sets everything up on a fresh machine")
    assert f"bash {script} [" in done.stdout
    assert "#" not in done.stdout


@pytest.mark.parametrize("arguments", ["--step 5", "--steps 0", "--steps x", "--folder"])
def test_quickstart_refuses_wrong_arguments_before_it_does_anything(arguments: str) -> None:
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", *arguments.split()], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert arguments.split()[0] in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    page = ROOT / name
    targets = [target for target in _LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_are_mentioned_exist(name: str) -> None:
    found = set(_PATH.findall((ROOT / name).read_text()))
    missing = [path for path in found if not path.startswith(_MADE) and not (ROOT / path).exists()]
    # `ds_efficient/<technique>/<metric>` and the like name metrics, not files.
    assert [path for path in missing if f"{path}/<" not in (ROOT / name).read_text()] == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_package_parse(name: str) -> None:
    for words in commands(ROOT / name):
        if words[0] == "ds_efficient":
            assert words[1] in COMMANDS
            assert words[1:2] == [build_command_parser().parse_args(_shapes(words[1:])).command]


def _shapes(words: list[str]) -> list[str]:
    return [word for word in words if word not in ("|", "head", ">")]


def _known_flags(module: str) -> set[str]:
    actions = importlib.import_module(module).build_parser()._actions
    return {flag for action in actions for flag in action.option_strings}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("launch/pretrain_gpt.py", "pretraining.arguments"),
        ("launch/prepare_data.py", "prepare_data"),
        ("launch/build_corpus.py", "build_corpus"),
    ],
)
def test_arguments_of_the_scripts_exist(name: str, script: str, module: str) -> None:
    known = _known_flags(module)
    for words in commands(ROOT / name):
        if script in words:
            given = [w.split("=")[0] for w in words[words.index(script) :] if w.startswith("--")]
            assert [flag for flag in given if flag not in known] == []


def test_the_training_page_names_only_arguments_that_exist() -> None:
    text = (DOCS / "training.md").read_text()
    named = set(re.findall(r"`(--[a-z][\w-]*)", text))
    assert len(named) > 20
    assert named - _known_flags("pretraining.arguments") == set()


def test_examples_of_training_pass_the_parser() -> None:
    from pretraining.arguments import parse_args

    parsed = 0
    for page in PAGES:
        for words in commands(page):
            if "launch/pretrain_gpt.py" in words and "--num-layers" in words:
                arguments = words[words.index("launch/pretrain_gpt.py") + 1 :]
                assert parse_args(arguments).num_layers > 0
                parsed += 1
    assert parsed >= 3


def test_json_examples_are_valid_configurations() -> None:
    from ds_efficient import load_config

    checked = 0
    for page in (
        ROOT / "README.md",
        *(DOCS / f"{n}.md" for n in ("configuration", "training", "any_model")),
        *sorted((DOCS / "techniques").glob("*.md")),
    ):
        for block in blocks(page, "json"):
            assert not load_config(json.loads(block)).warnings
            checked += 1
    assert checked


def test_every_shipped_configuration_is_in_the_list() -> None:
    text = (DOCS / "configuration.md").read_text()
    shipped = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert {name for name in shipped if f"ds_configs/{name}" not in text} == set()


def test_versions_of_the_readme_are_those_of_the_code() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

    from ds_efficient.core.deepspeed_compat import MINIMUM_VERSION
    from megatron_patches.version_guard import TESTED_VERSIONS

    text = (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.10,<3.14" and "| Python | 3.10 to 3.13 |" in text
    assert "torch>=2.6" in project["dependencies"] and "| torch | 2.6 and later |" in text
    assert f"| DeepSpeed | {MINIMUM_VERSION} and later |" in text
    assert f"| megatron-core | {TESTED_VERSIONS[0]} to {TESTED_VERSIONS[-1]} |" in text


def test_status_of_the_techniques_is_that_of_the_table() -> None:
    from ds_efficient.registry import TECHNIQUES

    for page in (ROOT / "README.md", DOCS / "index.md"):
        lines = page.read_text().splitlines()
        for row in TECHNIQUES:
            (line,) = (one for one in lines if one.startswith("|") and f"`{'.'.join(row.path)}`" in one)
            assert line.rstrip(" |").endswith("technique follows") == (row.technique is None)


def _measured() -> list[dict[str, str]]:
    rows = []
    for path in (DOCS / "results" / "data").glob("training_step_*.csv"):
        with open(path, newline="") as stream:
            rows += list(csv.DictReader(stream))
    return rows


def test_measurements_are_rendered_from_the_data_files() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        text = importlib.import_module("generate").measurements()
    finally:
        sys.path.remove(str(DOCS))
    assert _measured()
    for row in _measured():
        assert f"| {row['case']} | {row['gpu']} | {row['gpus']} |" in text
        assert f"{float(row['tokens_per_second']):,.0f}" in text


def test_speeds_in_the_readme_are_measured_ones() -> None:
    text = (ROOT / "README.md").read_text()
    claims = re.findall(r"^\| (NVIDIA [^|]+) \| (\d+) \| ([\d,]+) \| ([\d.]+)% \|$", text, re.MULTILINE)
    measured = {
        (r["gpu"], r["gpus"], f"{float(r['tokens_per_second']):,.0f}", f"{100 * float(r['mfu']):.1f}")
        for r in _measured()
        if r["case"].startswith("1.3b")
    }
    assert claims
    assert set(claims) <= measured


@pytest.mark.slow
def test_the_site_builds_without_warnings_from_fresh_parts(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra 'docs' is not installed")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "configuration.html").read_text()
    from ds_efficient.registry import TECHNIQUES

    assert all(row.title in page for row in TECHNIQUES)
    assert "refused [" in (tmp_path / "parallelism.html").read_text()
    assert "--tensor-model-parallel-size" in (tmp_path / "training.html").read_text()
    assert "initialize_model_parallel" in (tmp_path / "internals" / "megatron.html").read_text()
    assert "usage: ds_efficient validate" in (tmp_path / "commands.html").read_text()
