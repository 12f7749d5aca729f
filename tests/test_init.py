"""The package's public names, and the models under mindcv's."""

import inspect
import re
import shutil
import subprocess
import sys
import zipfile

import mindcv
import numpy as np
import pytest
import runs
from mindspore import Tensor

import skipvit
from skipvit import config

pytestmark = pytest.mark.usefixtures("graph_mode")

SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SPAN = {"start": 1, "end": 2, "keep_ratio": 0.45}


def test_public_names():
    assert set(skipvit.__all__) >= {"create_model", "SkipConfig", "VisionTransformer", "UserError"}
    for name in skipvit.__all__:
        assert getattr(skipvit, name) is not None
    assert (skipvit.SkipConfig, skipvit.UserError) == (config.SkipConfig, config.UserError)


@pytest.mark.parametrize("name", skipvit.__all__)
def test_a_public_name_says_what_it_is(name):
    thing = getattr(skipvit, name)
    text = inspect.getdoc(thing)
    assert text
    assert len(text) > 30
    if inspect.isfunction(thing):
        assert "Raises:" in text
        assert set(inspect.signature(thing).parameters) - {"overrides"} <= set(re.findall(r"\w+", text))
    for member in ("forward_features", "kept_tokens") if name == "VisionTransformer" else ():
        assert "(B, " in inspect.getdoc(getattr(thing, member))


def test_importing_is_quick_and_silent():
    """Beside what MindSpore itself takes; and nothing is imported that only some commands need."""
    code = """
import time
import mindspore, mindspore.dataset
started = time.process_time()
import skipvit
seconds = time.process_time() - started
assert seconds < 1, seconds
import sys
strange = {"matplotlib", "tensorboardX", "onnx", "onnxruntime", "torch"} & sys.modules.keys()
assert not strange, strange
"""
    ended = subprocess.run([sys.executable, "-c", code], env=runs.environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_wheel_holds_all_that_is_needed(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(runs.ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(runs.ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("skipvit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    packaged = {path.name for path in (tmp_path / "installed/skipvit").iterdir()}
    assert packaged >= {path.name for path in (runs.ROOT / "src/skipvit").iterdir() if path.suffix in (".py", ".yaml")}
    code = "import skipvit; print(skipvit.__file__); skipvit.create_model('vit_tiny_patch16_224', depth=1)"
    environment = runs.environment(PYTHONPATH=str(tmp_path / "installed"))
    ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(tmp_path / "installed/skipvit/__init__.py")


def test_the_version_is_the_packages():
    declared = re.search(r'^version = "(.*)"$', (runs.ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert skipvit.__version__ == declared.group(1)


def test_the_docstrings_example_runs():
    net = skipvit.create_model("skipvit_small_patch16_224", num_classes=10, skip=SPAN, **SIZES)
    assert net(Tensor(np.zeros((2, 3, 16, 16), np.float32))).shape == (2, 10)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("kind", ["vit", "skipvit"])
def test_mindcv_knows_every_model(kind, size):
    name = f"{kind}_{size}_patch16_224"
    assert name in mindcv.list_models()
    net = mindcv.create_model(name, num_classes=7, depth=2, skip=SPAN if kind == "skipvit" else None)
    assert isinstance(net, skipvit.VisionTransformer)
    width = config.SIZES[size][0]
    assert net.cls_token.shape == (1, 1, width)
    assert net.pos_embed.shape == (1, 197, width)
    assert net.head.weight.shape == (7, width)
    assert net.span_bounds == (((1, 2),) if kind == "skipvit" else ())


def test_mindcv_gives_the_recipes_model_by_its_name_alone():
    net = mindcv.create_model("skipvit_small_patch16_224")
    assert sum(parameter.size for parameter in net.get_parameters()) == 22_050_664
    default = config.SkipConfig()
    assert net.span_bounds == ((default.start, default.end),)


def test_mindcv_gives_the_same_weights_as_create_model():
    ours = skipvit.create_model("skipvit_tiny_patch16_224", 5, SPAN, **SIZES)
    theirs = mindcv.create_model("skipvit_tiny_patch16_224", num_classes=5, skip=SPAN, **SIZES)
    for mine, other in zip(ours.get_parameters(), theirs.get_parameters()):
        assert mine.name == other.name
        np.testing.assert_array_equal(mine.asnumpy(), other.asnumpy())


@pytest.mark.parametrize(
    ("keywords", "said"), [({"pretrained": True}, "pretrained"), ({"in_channels": 1}, "in_channels")]
)
def test_what_mindcv_may_ask_and_we_do_not_have_is_refused(keywords, said):
    with pytest.raises(skipvit.UserError, match=f"skipvit_tiny_patch16_224: .*{said}"):
        mindcv.create_model("skipvit_tiny_patch16_224", **keywords)
