#!/usr/bin/env bash
# Every check there is, having set up what is missing: ruff, mypy, shellcheck, pytest.
#
#   bash run_tests.sh [pytest argument ...]
#
# Arguments go to pytest, as in: bash run_tests.sh -m "not slow". The MindSpore is that of PYTHON=... or python3 where
# they have one, else .venv's. All checks run; the exit code is 1 where one of them failed.
set -euo pipefail
# shellcheck source=run_setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_setup.sh"

help_where_asked "$@"

choose_python requirements-dev.txt
"$PYTHON" -c 'import hypothesis, pytest, scipy, xdist' 2>/dev/null ||
  fail "$PYTHON lacks pytest, pytest-xdist, hypothesis or scipy; requirements-dev.txt has the versions"
PATH=$(dirname "$PYTHON"):$PATH
cd "$here"

passed='' failed='' skipped=''
# check NAME COMMAND...: run it, and note how it went.
check() {
  local name=$1
  shift
  echo "== $name: $*"
  if "$@"; then
    passed+=" $name"
  else
    failed+=" $name"
  fi
}
# lint NAME COMMAND...: the same, where the tool is there. In our own .venv it always is.
lint() {
  if [ "$PYTHON" = "$here/.venv/bin/python" ] || "$2" --version >/dev/null 2>&1; then
    check "$@"
  else
    skipped+=" $1"
  fi
}

lint ruff-check ruff check .
lint ruff-format ruff format --check .
lint mypy mypy
lint shellcheck shellcheck ./*.sh .ci/run .ci/lock
# A file's tests stay together, since they share what was trained once.
check pytest "$PYTHON" -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile "$@"

echo "on $("$PYTHON" -c 'import mindspore, sys; print(f"MindSpore {mindspore.__version__}, Python {sys.version.split()[0]}")' 2>/dev/null)"
echo "passed:$passed"
[ -z "$skipped" ] || echo "skipped, not installed with $PYTHON:$skipped"
if [ -n "$failed" ]; then
  echo "failed:$failed"
  exit 1
fi
