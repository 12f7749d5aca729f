"""The doors' shell: which recipe, which Python, and a set-up that survives being killed; with stand-ins for Python."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the same on every MindSpore: not in the fast part for 2.0.0

ROOT = Path(__file__).resolve().parent.parent
DOORS = ["run_train.sh", "run_tests.sh", "run_distribute_train.sh"]

# Passes the packages' check, and tells what it was run with.
RECORDER = """#!/usr/bin/env bash
if [ "$1" = - ]; then exit 0; fi
printf '%s\\n' "cwd=$PWD" "path=$PYTHONPATH" "$@"
exit "${EXIT:-0}"
"""

# A Python that can make virtual environments. That of the environment tells every call in `calls` beside .venv.
CREATOR = """#!/usr/bin/env bash
case "$*" in
  -c*ensurepip*) exit "${UNFIT:-0}" ;;
  -c*) exit 1 ;; # no MindSpore
  -V) echo Python 3.11.0 ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$STUBS/inner" "$3/bin/python"
    ;;
esac
"""
INNER = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")/../.." && pwd)
echo "$*" >>"$here/calls"
case "$*" in
  "-m pip install"*)
    sleep "${PIP_SECONDS:-0}"
    touch "$here/.venv/half"
    [ -z "${PIP_KILLED:-}" ] || kill -9 "$PPID"
    exit "${PIP_EXIT:-0}"
    ;;
  -) exit 0 ;;
  *) echo trained ;;
esac
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(door, *arguments, cwd, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        ["bash", str(door), *arguments],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(result):
    """The one line that a door ends with on bad input."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


# --------------------------------------------------------------------------------------------------- run_train


@pytest.fixture
def recorder(tmp_path):
    return str(program(tmp_path / "stand ins" / "python", RECORDER))


def train_arguments(result):
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2:4] == ["-m", "skipvit.train"]
    return lines[4:]


def test_without_a_recipe_it_is_the_embedded_default(tmp_path, recorder):
    result = run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=recorder, PYTHONPATH="/other")
    assert train_arguments(result) == [str(ROOT / "configs/clutter/skipvit.yaml")]
    assert result.stdout.splitlines()[:2] == [f"cwd={tmp_path}", f"path={ROOT}/src:/other"]


def test_an_override_alone_keeps_the_default(tmp_path, recorder):
    result = run(ROOT / "run_train.sh", "train.epochs=1", "train.output=a b", cwd=tmp_path, PYTHON=recorder)
    assert train_arguments(result) == [str(ROOT / "configs/clutter/skipvit.yaml"), "train.epochs=1", "train.output=a b"]


def test_recipe_is_of_the_callers_folder_and_may_hold_blanks_and_equals(tmp_path, recorder):
    (tmp_path / "my = recipe.yaml").touch()
    result = run(ROOT / "run_train.sh", "my = recipe.yaml", "train.epochs=1", cwd=tmp_path, PYTHON=recorder)
    assert train_arguments(result) == ["my = recipe.yaml", "train.epochs=1"]
    result = run(ROOT / "run_train.sh", "missing.yaml", cwd=tmp_path, PYTHON=recorder)
    assert train_arguments(result) == ["missing.yaml"]  # train says that it is missing


def test_python_may_be_given_below_the_callers_folder(tmp_path, recorder):
    result = run(ROOT / "run_train.sh", "x.yaml", cwd=tmp_path, PYTHON=os.path.relpath(recorder, tmp_path))
    assert train_arguments(result) == ["x.yaml"]
    echo = program(tmp_path / "own" / "python", RECORDER.replace("cwd=$PWD", "$0"))
    assert run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON="own/python").stdout.splitlines()[0] == str(echo)


@pytest.mark.parametrize(("given", "seen"), [({}, "glibc.malloc.hugetlb=1"), ({"GLIBC_TUNABLES": "own"}, "own")])
def test_memory_comes_in_huge_pages_unless_told_otherwise(given, seen, tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    python = program(tmp_path / "python", RECORDER.replace("cwd=$PWD", "$GLIBC_TUNABLES"))
    assert run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=str(python), **given).stdout.splitlines()[0] == seen


def test_exit_code_is_that_of_training(tmp_path, recorder):
    assert run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=recorder, EXIT="143").returncode == 143


@pytest.mark.parametrize("door", DOORS)
def test_help_sets_nothing_up(tmp_path, door):
    result = run(ROOT / door, "--help", cwd=tmp_path, PYTHON="/nowhere")
    assert result.returncode == 0
    assert f"bash {door}" in result.stdout
    assert "#" not in result.stdout.replace("# ", "")


# ----------------------------------------------------------------------------------------------- given Pythons


def given_python(tmp_path, **modules):
    """A real Python that has the standard library and these modules only."""
    for name, text in modules.items():
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / f"{name}.py").write_text(text, encoding="utf-8")
    wrapper = f'#!/usr/bin/env bash\nPYTHONPATH="{tmp_path}/modules" exec "{sys.executable}" -S "$@"\n'
    return str(program(tmp_path / "given", wrapper))


def test_python_that_is_no_program(tmp_path):
    says = refused(run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON="/nowhere/python"))
    assert says.startswith("error: PYTHON: no such program")


def test_python_without_mindspore(tmp_path):
    says = refused(run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=given_python(tmp_path)))
    assert "has no MindSpore" in says


def test_python_that_lacks_packages_is_told_which_and_left_alone(tmp_path):
    python = given_python(tmp_path, mindspore="__version__ = '2.5.0'", yaml="")
    says = refused(run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=python))
    assert says.endswith("lacks mindcv, pillow, tqdm; install with: pip install --no-deps mindcv pillow tqdm")


def test_mindspore_that_cannot_be_imported(tmp_path):
    broken = "print('noise')\nraise ImportError('libgomp.so.1:\\n cannot open')"
    python = given_python(tmp_path, mindspore=broken, mindcv="", yaml="", PIL="", tqdm="")
    says = refused(run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=python))
    assert says == f"error: {python} cannot import its MindSpore: ImportError: libgomp.so.1: cannot open"


def test_mindspore_whose_import_kills_the_process(tmp_path):
    python = given_python(tmp_path, mindspore="import os; os._exit(9)", mindcv="", yaml="", PIL="", tqdm="")
    says = refused(run(ROOT / "run_train.sh", cwd=tmp_path, PYTHON=python))
    assert says == f"error: {python} cannot import MindSpore and tell why; try: {python} -c 'import mindspore'"


# -------------------------------------------------------------------------------------------------- set-up


@pytest.fixture
def clone(tmp_path):
    """A folder with the doors in it and a blank in its name, and stand-ins for every Python on PATH."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ["run_train.sh", "run_setup.sh", *(path.name for path in ROOT.glob("requirements*"))]:
        shutil.copy(ROOT / name, folder / name)
    stubs = tmp_path / "stubs"
    for name in ("python3", "python3.10", "python3.11", "python3.12"):
        program(stubs / name, CREATOR)
    program(stubs / "inner", INNER)
    return folder


def start(clone, first_on_path="/nowhere", **environment):
    stubs = clone.parent / "stubs"
    path = f"{first_on_path}:{stubs}:/usr/local/bin:/usr/bin:/bin"
    return run(clone / "run_train.sh", cwd=clone.parent, PATH=path, STUBS=str(stubs), **environment)


def calls(clone):
    """Calls of .venv's Python since the last look: install, check, train."""
    words = {"-m pip": "install", "-": "check", "-m skipvit.train": "train"}
    path = clone / "calls"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [words[" ".join(line.split()[:2])] for line in lines]


def test_the_first_start_sets_up_and_the_second_does_not(clone):
    first = start(clone)
    assert (first.returncode, first.stdout) == (0, "trained\n"), first.stderr
    assert "setting up" in first.stderr
    assert calls(clone) == ["install", "check", "train"]
    second = start(clone)
    assert (second.stdout, second.stderr) == ("trained\n", "")
    assert calls(clone) == ["train"]


def test_changed_requirements_are_installed(clone):
    start(clone)
    calls(clone)
    with open(clone / "requirements.txt", "a", encoding="utf-8") as file:
        file.write("another==1\n")
    assert start(clone).returncode == 0
    assert calls(clone) == ["install", "check", "train"]


def test_a_python3_that_has_mindspore_is_used_and_nothing_set_up(clone):
    modules = {"mindcv": "", "yaml": "", "PIL": "", "tqdm": ""}
    given = given_python(clone.parent, mindspore="__version__ = '2.5.0'", **modules)
    os.replace(given, clone.parent / "stubs/python3")
    result = start(clone)
    assert "No module named 'skipvit'" in result.stderr  # which is not in this folder: so it came to training
    assert not (clone / ".venv").exists()


def test_an_activated_venv_is_brought_up_to_date_all_the_same(clone):
    start(clone)
    calls(clone)
    modules = {"mindcv": "", "yaml": "", "PIL": "", "tqdm": ""}
    given = given_python(clone.parent, mindspore="__version__ = '2.10.0'", **modules)
    shutil.copy(given, clone / ".venv/bin/python3")
    with open(clone / "requirements.txt", "a", encoding="utf-8") as file:
        file.write("another==1\n")
    assert start(clone, first_on_path=clone / ".venv/bin").stdout == "trained\n"
    assert calls(clone) == ["install", "check", "train"]


@pytest.mark.parametrize("how", [{"PIP_KILLED": "1"}, {"PIP_EXIT": "1"}])
def test_a_set_up_that_was_killed_or_failed_is_begun_anew(clone, how):
    assert start(clone, **how).returncode != 0
    assert (clone / ".venv/half").exists()
    (clone / ".venv/debris").touch()
    assert "train" not in calls(clone)
    result = start(clone)
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr
    assert calls(clone) == ["install", "check", "train"]
    assert not (clone / ".venv/debris").exists()


def test_a_set_up_that_fails_says_so(clone):
    says = refused(start(clone, PIP_EXIT="1"))
    assert says.startswith("error: the packages of requirements.txt could not be installed")


def test_a_venv_of_somebody_else_is_used_and_never_changed(clone):
    program(clone / ".venv/bin/python", INNER)
    assert start(clone).stdout == "trained\n"
    assert calls(clone) == ["check", "train"]
    assert {path.name for path in (clone / ".venv").iterdir()} == {"bin"}


def test_two_starts_at_once_set_up_once(clone):
    if shutil.which("flock") is None:
        pytest.skip("no flock on this machine: starts do not wait for each other")
    stubs = clone.parent / "stubs"
    environment = {**os.environ, "PATH": f"{stubs}:/usr/bin:/bin", "STUBS": str(stubs), "PIP_SECONDS": "1"}
    environment.pop("PYTHON", None)
    both = [
        subprocess.Popen(["bash", str(clone / "run_train.sh")], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == ["trained\n"] * 2
    assert sorted(calls(clone)) == ["check", "install", "train", "train"]


def test_no_fit_python(clone):
    says = refused(start(clone, UNFIT="1"))
    assert says.startswith(
        "error: no Python 3.10, 3.11 or 3.12 that can make a virtual environment (python3 is Python 3.1"
    )
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-ms200"])
def test_the_locks_are_of_the_requirements(name):
    """A pin that was changed and not locked would not be what is installed: `bash .ci/lock`."""
    wanted = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (ROOT / f"{name}.txt").read_text(), flags=re.MULTILINE)
    lock = (ROOT / f"{name}.lock").read_text()
    locked = {(package, version) for package, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", lock, re.MULTILINE)}
    assert {(re.sub(r"[-_.]+", "-", package).lower(), version) for package, version in wanted} <= locked
    entries = re.split(r"\n(?=[a-z])", lock)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
    assert "://" not in lock, "an index of somebody's"
