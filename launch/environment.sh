# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv (unless an environment is active), installs this
# project with the extras in $1, and torch 2.13.0 unless a torch is there.
#   PYTHON=python3.12   interpreter of a new environment
#   VENV=path           where it goes (default .venv)
extras=${1:-.}
if [ -z "${VIRTUAL_ENV:-}" ] || [ -n "${VENV:-}" ]; then
  VENV=${VENV:-.venv}
  interpreter=${PYTHON:-python3}
  "$interpreter" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
    echo "$interpreter is $("$interpreter" --version 2>&1): Python 3.10 to 3.13 is needed; set PYTHON=python3.12" >&2
    exit 2
  }
  [ -x "$VENV/bin/python" ] || "$interpreter" -m venv "$VENV"
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi
stamp=$(python - "$extras" <<'PYTHON'
import hashlib, pathlib, sys
text = pathlib.Path("pyproject.toml").read_text() + sys.argv[1] + sys.version
print(hashlib.sha256(text.encode()).hexdigest())
PYTHON
)
if [ "$(cat "$VIRTUAL_ENV/.ds_efficient_installed" 2>/dev/null)" != "$stamp" ]; then
  quiet=(--disable-pip-version-check --quiet)
  python -c 'import torch' 2>/dev/null || {
    echo "installing torch 2.13.0"
    # A release as a range would fetch gigabytes of CUDA libraries on a machine without a GPU.
    python -m pip install "${quiet[@]}" torch==2.13.0
  }
  echo "installing ds_efficient $extras"
  # DeepSpeed's own ops are compiled at first use, if at all; its setup must not try.
  DS_BUILD_OPS=0 python -m pip install "${quiet[@]}" --editable "$extras"
  echo "$stamp" > "$VIRTUAL_ENV/.ds_efficient_installed"
fi
