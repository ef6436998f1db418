# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv (unless an environment is active), installs this
# project with the extras in $1, and torch 2.13.0 unless a torch is there.
#   PYTHON=python3.12   interpreter of a new environment
#   VENV=path           where it goes (default .venv)
# Interrupted, it goes on where it was at the next start.
extras=${1:-.}

# Runs a command with its output in a file, and prints the file's last line every 10 s; all of its end on failure.
with_progress() {
  local log status=0 beat begin=$SECONDS
  log=$(mktemp)
  (while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    printf '   %3d s: %s\n' "$((SECONDS - begin))" "$(grep -v -e '^WARNING' -e '^ *$' "$log" | tail -n 1 | cut -c1-100)"
  done) &
  beat=$!
  "$@" >"$log" 2>&1 || status=$?
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  if [ "$status" = 0 ]; then printf '   done in %d s\n' "$((SECONDS - begin))"; else tail -n 30 "$log" >&2; fi
  rm -f "$log"
  return "$status"
}

if [ -z "${VIRTUAL_ENV:-}" ] || [ -n "${VENV:-}" ]; then
  VENV=${VENV:-.venv}
  interpreter=${PYTHON:-python3}
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    "$interpreter" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
      echo "$interpreter is $("$interpreter" --version 2>&1): Python 3.10 to 3.13 is needed; set PYTHON=python3.12" >&2
      exit 2
    }
    echo "making the environment $VENV with $("$interpreter" --version)"
    "$interpreter" -m venv "$VENV" || {
      echo "$interpreter cannot make an environment; install its venv module (Debian: apt install python3-venv)" >&2
      exit 2
    }
  fi
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi
# Packages are installed without bytecode, which saves half a minute: it is made and kept at the first import.
unset PYTHONDONTWRITEBYTECODE
stamp=$(python - "$extras" <<'PYTHON'
import hashlib, os, pathlib, sys
text = pathlib.Path("pyproject.toml").read_text() + sys.argv[1] + sys.version + os.getcwd()
print(hashlib.sha256(text.encode()).hexdigest())
PYTHON
)
if ! grep -qsx "$stamp" "$VIRTUAL_ENV/.ds_efficient_installed"; then
  packages=(--editable "$extras")
  # A torch release as a range could fetch gigabytes of CUDA libraries on a machine without a GPU.
  python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' || packages+=(torch==2.13.0)
  echo "installing ${packages[*]}"
  # DeepSpeed's own ops are compiled at first use, if at all; its setup must not try.
  DS_BUILD_OPS=0 with_progress python -m pip install --disable-pip-version-check --no-compile "${packages[@]}" || {
    echo "the installation failed; see above. The same command again goes on from here." >&2
    exit 2
  }
  echo "$stamp" >> "$VIRTUAL_ENV/.ds_efficient_installed"
fi
