"""The layout: who may import whom, who may know what, and that the README tells what is tested."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "skipvit"

# In dependency order: a module imports only from modules above it.
LIBRARY = [
    "config",
    "runtime",
    "kernels",
    "tokens",
    "cost",
    "model",
    "clutter",
    "data",
    "optim",
    "step",
    "checkpoint",
    "log",
    "watch",
    "audit",
    "draw",
    "rank_table",
    "inference",
    "launch",
]
COMMANDS = ["evaluate", "train", "benchmark", "visualize", "predict", "convert", "export"]
ORDER = [*LIBRARY, *COMMANDS, "__init__"]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree_of(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports_of(module):
    """Names of the package's modules that it imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py, line {node.lineno}: a relative import; write skipvit.…"
            if node.module == "skipvit":
                names |= {alias.name if alias.name in MODULES else "__init__" for alias in node.names}
            elif (node.module or "").startswith("skipvit."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("skipvit.")}
    return names


def words_of(module):
    """Attribute names, bare names and text in the code; docstrings apart."""
    tree = tree_of(module)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER), "put a new module into the order of this test"
    assert {"config", "runtime", "tokens", "model", "data", "step", "train", "evaluate"} <= set(MODULES)
    assert not list(PACKAGE.glob("*/*.py")), "the package is flat"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_above(module):
    above = ORDER[: ORDER.index(module)]
    below = imports_of(module) - set(above)
    assert not below, f"{module}.py imports {sorted(below)}, which the layout has below it"


def test_of_commands_only_train_imports_one():
    found = {(module, name) for module in MODULES for name in imports_of(module) if name in COMMANDS}
    assert {pair for pair in found if pair[0] != "__init__"} <= {("train", "evaluate")}


def test_what_the_launcher_needs_imports_no_mindspore():
    """A mistake is told before the slow import, and the launcher outlives whatever MindSpore does to a rank."""
    without = {"config", "log", "rank_table", "launch"}
    for module in without:
        roots = {
            name.split(".")[0]
            for node in ast.walk(tree_of(module))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not roots & {"mindspore", "mindcv"}, module
        assert imports_of(module) <= without, module


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("runtime", "launch")])
def test_only_runtime_knows_the_device_and_the_release(module):
    """``runtime.py`` decides by device and release; the launcher, which starts devices, alone may name one too."""
    knowing = {"device_target", "set_device", "get_context", "set_context", "RANK_ID", "DEVICE_ID"}
    named = [f"line {line}: {word}" for line, word in words_of(module) if word in knowing or word == "Ascend"]
    assert not named, f"{module}.py: {named}; ask runtime.py instead"
    assert not re.search(r"\b(ms|mindspore)\.__version__", (PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [name for name in MODULES if name in COMMANDS])
def test_a_command_is_a_main_and_does_nothing_at_import(module):
    tree = tree_of(module)
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    calls = [node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not calls


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_or_evaluated(module):
    dangerous = {
        "pickle",
        "cPickle",
        "eval",
        "exec",
        "unsafe_load",
        "full_load",
        "FullLoader",
        "UnsafeLoader",
        "marshal",
    }
    named = [f"line {line}: {word}" for line, word in words_of(module) if word in dangerous]
    assert not named, f"{module}.py: {named}"


# ---------------------------------------------------------------------------------------------------- README


def code_blocks(text):
    return re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.DOTALL)


def test_the_two_commands_of_the_readme_are_those_that_ci_runs():
    """``.ci/run`` runs both: the tests, and the main command with an empty cache."""
    blocks = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    quick_start = next(block for block in blocks if "run_train.sh" in block)
    commands = [line.split("#")[0].strip() for line in quick_start.splitlines() if line.startswith("bash ")]
    assert commands == ["bash run_train.sh", "bash run_tests.sh"]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in commands:
        script = command.split()[1]
        assert re.search(rf'bash "[$]here/{script}"[)]?(?! [a-z-])', ci), command


def test_paths_that_the_documents_name_exist():
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
        named = re.findall(r"\bconfigs/[\w/]+\.yaml\b", text)
        missing = [link for link in links if not (document.parent / link).exists()]
        missing += [name for name in named if not (ROOT / name).exists()]
        assert not missing, f"{document.name} names {missing}"


def test_no_registry_address_and_no_machine_path():
    """What is committed must not depend on the machine it was written on."""
    suffixes = {".py", ".sh", ".md", ".yaml", ".toml", ".txt"}
    files = [path for folder in (".", "src/skipvit", "tests", "docs") for path in (ROOT / folder).glob("*.*")]
    files += [*(ROOT / "configs").rglob("*.yaml"), ROOT / ".ci" / "run"]
    places = re.compile(r"(?<![\w$}])/(?:work|root|home/\w+|tmp/envs)\b/")
    for path in files:
        if path.suffix in suffixes or path.name == "run":
            found = places.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found.group(0)}"
