# shellcheck shell=bash
# Sourced by the doors (run_train.sh, run_distribute_train.sh, run_tests.sh): which Python runs, and setting one up.
# Whatever is said goes to standard error.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

# help_where_asked ARGUMENT...: with -h or --help as the first, print the comment at the head of the door, and end.
help_where_asked() {
  case ${1:-} in
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
      exit
      ;;
  esac
}

# choose_python [REQUIREMENTS]: set and export PYTHON, PYTHONPATH and how it asks for memory. The Python is, in order,
#   PYTHON from the environment;
#   python3, where it has a MindSpore, as on a cluster: nothing is installed over it (.venv's, if that is activated, is
#   no such Python);
#   .venv, set up here from REQUIREMENTS (requirements.txt).
# Exits with 2 and one line where it lacks a package or none can be had.
choose_python() {
  if [ -n "${PYTHON:-}" ]; then
    PYTHON=$(command -v "$PYTHON") || fail "PYTHON: no such program; give a Python that has MindSpore, or unset it"
    [ "${PYTHON#/}" != "$PYTHON" ] || PYTHON=$PWD/$PYTHON
    check_packages "$PYTHON"
  elif has_mindspore python3 && ! [ "$(dirname "$(command -v python3)")" -ef "$here/.venv/bin" ]; then
    PYTHON=$(command -v python3)
    check_packages "$PYTHON"
  else
    PYTHON=$here/.venv/bin/python
    set_up_venv "$here/.venv" "${1:-requirements.txt}"
  fi
  export PYTHON PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}"
  # In huge pages, where the kernel grants them: a first step on CPU is seconds shorter (docs/LOG.md).
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
}

# has_mindspore PYTHON: whether one is installed (a mere folder of that name is not).
has_mindspore() {
  "$1" -c 'import importlib.util as u, sys; sys.exit(not getattr(u.find_spec("mindspore"), "origin", None))' 2>/dev/null
}

# check_packages PYTHON: all that the package imports is there, and MindSpore can be imported.
check_packages() {
  local problem
  problem=$("$1" - 2>/dev/null <<'EOF'
import importlib.util
import os
import sys

answer = os.dup(1)
os.dup2(2, 1)  # imports may print
packages = {"mindcv": "mindcv", "yaml": "PyYAML", "PIL": "pillow", "tqdm": "tqdm"}
missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
problem = ""
if sys.version_info < (3, 9):
    problem = f"is Python {sys.version.split()[0]}; 3.9 or later is needed"
elif importlib.util.find_spec("mindspore") is None:
    problem = "has no MindSpore; install the one for this machine, or choose another Python with PYTHON="
elif missing:
    # Without dependencies: none of these may bring a NumPy that the MindSpore there does not take.
    problem = f"lacks {', '.join(missing)}; install with: pip install --no-deps {' '.join(missing)}"
else:
    try:
        import mindspore

        mindspore.__version__
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        problem = f"cannot import its MindSpore: {type(error).__name__}: {reason}"
os.write(answer, problem.encode())
EOF
  ) || problem="cannot import MindSpore and tell why; try: $1 -c 'import mindspore'"
  [ -z "$problem" ] || fail "$1 $problem"
}

# set_up_venv FOLDER REQUIREMENTS [PYTHON]: a virtual environment with these packages, made or brought up to date
# where it needs to be, by PYTHON. What is installed is the lock of the requirements, which .ci/lock makes of them: a
# package whose checksum is not in it is refused. The environment's folder skipvit-setup holds a copy of the requirements when it is complete, and
# `unfinished` while it is being set up, so that one whose set-up was killed is begun anew. Two starts take turns.
set_up_venv() {
  is_complete "$1" "$2" && return
  (
    # The lock is on this folder itself and leaves nothing behind; where there is none (NFS), it goes without.
    ! command -v flock >/dev/null || flock 9 2>/dev/null || true
    is_complete "$1" "$2" || make_venv "$@"
  ) 9<"$here" || exit
}

is_complete() {
  [ ! -e "$1/skipvit-setup/unfinished" ] && cat "$here"/requirements*.{txt,lock} | cmp -s - "$1/skipvit-setup/$2"
}

make_venv() {
  local venv=$1 requirements=$2 python=${3:-} quiet=--quiet
  if [ -e "$venv" ] && [ ! -e "$venv/skipvit-setup" ]; then
    # Somebody's own: used as it is, never changed.
    check_packages "$venv/bin/python"
    return
  fi
  if [ -e "$venv/skipvit-setup/unfinished" ]; then
    find "$venv" -mindepth 1 -maxdepth 1 ! -name skipvit-setup -exec rm -rf {} +
  fi
  if [ ! -x "$venv/bin/python" ]; then
    python=${python:-$(find_python)} || exit
    if ! mkdir -p "$venv/skipvit-setup" || ! : >"$venv/skipvit-setup/unfinished"; then
      fail "$venv cannot be made, as said above; give a Python that has MindSpore with PYTHON="
    fi
    echo "setting up $venv with $("$python" -V 2>&1), once, for some minutes" >&2
    "$python" -m venv "$venv" >&2 || fail "$python -m venv failed, as said above; give another Python with PYTHON="
  fi
  : >"$venv/skipvit-setup/unfinished"
  [ ! -t 2 ] || quiet=
  # shellcheck disable=SC2086 # $quiet is one word or none
  "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-input --require-hashes \
    -r "$here/${requirements%.txt}.lock" >&2 </dev/null ||
    fail "the packages of $requirements could not be installed, as said above; docs/ascend.md says how without internet"
  check_packages "$venv/bin/python"
  cat "$here"/requirements*.{txt,lock} >"$venv/skipvit-setup/$requirements"
  rm "$venv/skipvit-setup/unfinished"
}

# find_python: the first Python that requirements.txt is for and that can make a virtual environment.
find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12 python3.10; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.10, 3.11 or 3.12 that can make a virtual environment (python3 is" \
    "$(python3 -V 2>&1 | tail -n 1)); install python3.11 and python3.11-venv, or give PYTHON= one that has MindSpore"
}
