"""Launch scripts and the Dockerfile: what can be checked without a cluster or a container engine."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
NAMES = "pdsh/pretrain.sh no_ssh/pretrain_node.sh mpi/pretrain.sh mpi/rank.sh slurm/pretrain.sbatch"
SCRIPTS = [LAUNCH / name for name in NAMES.split()]
AWKWARD = ["--data-path", "0.3 a b", "--note", 'it\'s $HOME; `id` "*"', ""]


def bash(
    script: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI", "MASTER"))}
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**inherited, **(env or {})},
    )


def program(folder: Path, name: str, body: str) -> None:
    """Put a program into `folder`."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def recorder(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose python writes its arguments, one a line, to the file of RECORD."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, "python", 'printf "%s\\n" "$@" > "$RECORD"; env > "$RECORD.env"')
    program(programs, "pdsh", "exit 0")
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "PYTHON": "python",
    }


def recorded(recorder: dict[str, str]) -> list[str]:
    return Path(recorder["RECORD"]).read_text().split("\n")[:-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(LAUNCH).as_posix())
def test_script_parses_is_strict_quotes_arguments_and_has_help(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -euo pipefail$", text, re.M)
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert '"$@"' in code
    messages = re.compile(r'^ *echo ".*" >&2$', re.M)
    assert not re.search(r"\$\*|(?<!\")\$@", messages.sub("", code)), "arguments must stay quoted"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    shown = bash(script, "--help")
    assert shown.returncode == 0 and script.name.split(".")[0] in shown.stdout and not shown.stderr
    assert "set -euo" not in shown.stdout
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-s", "bash", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_every_launch_script_is_checked_here() -> None:
    found = {path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch")}
    assert {path for path in found if path.parent != LAUNCH} == set(SCRIPTS)


def test_no_ssh_starts_this_node_and_passes_arguments_unchanged(
    tmp_path: Path, recorder: dict[str, str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two hosts\nalpha slots=2\n\nbeta slots=2  # slow\n")
    done = bash(LAUNCH / "no_ssh/pretrain_node.sh", "1", str(hostfile), "--", *AWKWARD, env=recorder)
    assert done.returncode == 0, done.stderr
    words = recorded(recorder)
    launcher = (
        f"-m deepspeed.launcher.runner --hostfile {hostfile} --no_ssh --node_rank 1 --master_addr alpha"
    )
    assert words == [*launcher.split(), "--master_port", "29500", f"{LAUNCH}/pretrain_gpt.py", *AWKWARD]
    for rank in ("2", "-1", "x"):
        done = bash(LAUNCH / "no_ssh/pretrain_node.sh", rank, str(hostfile), env=recorder)
        assert done.returncode == 2 and f"NODE_RANK {rank}: must be 0 to 1" in done.stderr


def test_pdsh_starts_the_launcher_and_passes_arguments_unchanged(
    tmp_path: Path, recorder: dict[str, str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("alpha slots=2\nbeta slots=2\n")
    env = {**recorder, "SCRIPT": "launch/check_cluster.py", "MASTER_PORT": "29777"}
    done = bash(LAUNCH / "pdsh/pretrain.sh", str(hostfile), "--", *AWKWARD, env=env)
    assert done.returncode == 0, done.stderr
    launcher = f"-m deepspeed.launcher.runner --hostfile {hostfile} --launcher pdsh --master_port 29777"
    assert recorded(recorder) == [*launcher.split(), f"{LAUNCH}/check_cluster.py", *AWKWARD]
    done = bash(LAUNCH / "pdsh/pretrain.sh", f"{tmp_path}/none", env=recorder)
    assert done.returncode == 2 and f"HOSTFILE {tmp_path}/none: cannot be read" in done.stderr


def test_mpi_maps_ranks_and_passes_arguments_unchanged(tmp_path: Path, recorder: dict[str, str]) -> None:
    """A stand-in for mpirun starts rank 3 of 4 as Open MPI would."""
    values = {"RANK": 3, "SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}
    ranks = " ".join(f"OMPI_COMM_WORLD_{name}={value}" for name, value in values.items())
    body = 'printf "%s " "$@" > "$RECORD.mpi"; while [ "$1" != bash ]; do shift; done\n'
    program(Path(recorder["PATH"].split(":")[0]), "mpirun", f'{body}{ranks} exec "$@"')
    (tmp_path / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    options = ["-np", "4", "--hostfile", str(tmp_path / "hosts")]
    env = {**recorder, "NCCL_DEBUG": "INFO"}
    done = bash(LAUNCH / "mpi/pretrain.sh", *options, "--", *AWKWARD, env=env)
    assert done.returncode == 0, done.stderr
    assert recorded(recorder) == [f"{LAUNCH}/pretrain_gpt.py", *AWKWARD]
    variables = dict(
        line.split("=", 1)
        for line in Path(recorder["RECORD"] + ".env").read_text().splitlines()
        if "=" in line
    )
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "alpha"}
    assert {name: variables[name] for name in expected} == expected
    sent = Path(recorder["RECORD"] + ".mpi").read_text()
    assert "-x NCCL_DEBUG " in sent and "-x MASTER_ADDR " in sent and "-np 4 --hostfile" in sent
    done = bash(LAUNCH / "mpi/pretrain.sh", "-np", "2", env=recorder)
    assert done.returncode == 2 and "-- is missing" in done.stderr
    done = bash(LAUNCH / "mpi/rank.sh", "true")
    assert done.returncode == 2 and "start it with mpirun" in done.stderr


SLURM = {
    "SLURM_JOB_ID": "21234",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_GPUS_ON_NODE": "4",
}


def slurm_programs(folder: Path) -> None:
    """Stand-ins: srun runs the command once, here; scancel sends the signal to it."""
    program(
        folder, "scontrol", '[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "$@" >> "$RECORD.slurm"'
    )
    program(folder, "srun", 'while [ "$1" != bash ]; do shift; done; echo $$ > "$RECORD.pid"; exec "$@"')
    program(folder, "scancel", 'echo "scancel $@" >> "$RECORD.slurm"; kill -USR1 "$(cat "$RECORD.pid")"')


def test_slurm_starts_torchrun_on_each_node_and_passes_arguments_unchanged(recorder: dict[str, str]) -> None:
    slurm_programs(Path(recorder["PATH"].split(":")[0]))
    done = bash(LAUNCH / "slurm/pretrain.sbatch", "--", *AWKWARD, env={**recorder, **SLURM})
    assert done.returncode == 0, done.stderr
    torchrun = (
        "-m torch.distributed.run --nnodes 2 --nproc-per-node 4 --max-restarts 0 --rdzv-id 21234 "
        "--rdzv-backend c10d --rdzv-endpoint node1:11234"
    )
    assert recorded(recorder) == [*torchrun.split(), f"{ROOT}/launch/pretrain_gpt.py", *AWKWARD]
    assert not Path(recorder["RECORD"] + ".slurm").exists()  # finished: not sent back to the queue
    done = bash(LAUNCH / "slurm/pretrain.sbatch")
    assert done.returncode == 2 and "submit it with sbatch" in done.stderr


# Stands for torchrun and the trainer. USR1 is ignored at first; then the batch script (its parent) gets one.
_TRAINER = """
import os, signal, sys, time
if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
    sys.exit(9)
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
os.kill(int(sys.argv[1]), signal.SIGUSR1)
end = time.monotonic() + 30
while not received and time.monotonic() < end:
    time.sleep(0.05)
sys.exit(int(sys.argv[2]) if received else 8)
"""


@pytest.mark.parametrize(("status", "requeued"), [(0, True), (7, False)])
def test_slurm_time_limit_saves_and_requeues(recorder: dict[str, str], status: int, requeued: bool) -> None:
    folder = Path(recorder["PATH"].split(":")[0])
    slurm_programs(folder)
    trainer = folder / "trainer.py"
    trainer.write_text(_TRAINER)
    program(folder, "python", f'exec {sys.executable} {trainer} "$PPID" {status}')
    done = bash(LAUNCH / "slurm/pretrain.sbatch", env={**recorder, **SLURM})
    assert done.returncode == status, done.stderr
    calls = Path(recorder["RECORD"] + ".slurm").read_text().splitlines()
    assert calls == ["scancel --signal=USR1 21234", *(["requeue 21234"] if requeued else [])]


def test_sbatch_directives_stand_before_the_first_command() -> None:
    lines = (LAUNCH / "slurm/pretrain.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")]
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@120"} <= set(directives)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", directive) for directive in directives)


def dockerfile() -> str:
    return re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())


def test_dockerfile_copies_what_exists_and_dockerignore_lets_it_through() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)$", dockerfile(), re.M) for name in line.split()[:-1]]
    assert "pyproject.toml" in copied and "ds_efficient" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert set(copied) == let_through


def test_dockerfile_pins_agree_with_the_package() -> None:
    text = dockerfile()
    pins = {
        name.lower().removesuffix("_version").replace("_", "-"): value
        for name, value in re.findall(r"^ARG (\w+_VERSION)=(\S+)$", text, re.M)
    }
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r'pip install --editable "\.\[(.*)\]"', text)
    wanted = [*project["dependencies"]]
    for extra in extras.split(","):
        wanted += project["optional-dependencies"][extra]
    checked = set()
    for requirement in map(Requirement, wanted):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
            assert f'"{requirement.name}==${{{requirement.name.upper().replace("-", "_")}_VERSION}}"' in text
            checked.add(requirement.name)
    assert checked == set(pins) - {"cuda", "python"}
    assert Requirement(f"python{project['requires-python']}").specifier.contains(pins["python"])
    assert {"torch", "deepspeed", "megatron-core", "transformers"} <= checked


def test_docker_image_does_not_run_as_root_and_builds_the_kernels() -> None:
    lines = [line for line in dockerfile().splitlines() if line and not line.startswith("#")]
    user = lines.index("USER trainer")
    prebuild = next(i for i, line in enumerate(lines) if "ds_efficient prebuild --arch" in line)
    assert user < prebuild
    assert not any(line.startswith("USER") for line in lines[user + 1 :])
    assert 'ARG ARCHITECTURES="8.0;9.0a"' in lines
