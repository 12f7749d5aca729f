"""Checkpoints: MindSpore's own format, atomic, checked to the last bit, and never half restored."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
import runs
from mindspore import Parameter, Tensor

from skipvit import checkpoint, config, model
from skipvit.config import UserError

CONFIG = config.from_dict({**runs.RECIPE, "model": {**runs.RECIPE["model"], "num_classes": 3}})
META = {"config": CONFIG.to_dict(), "classes": ["crow", "heron", "owl"], "step": 7}
ARRAYS = {
    "blocks.0.weight": np.arange(15, dtype=np.float32).reshape(3, 5) - 7,
    "blocks.0.bias": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
    "half": np.array([[1.5], [65504]], np.float16),
    "state.loss_scale": np.array(65536, np.float32),
    "state.waiting": np.array(-3, np.int32),
    "single": np.array([2**31 - 1], np.int32),
}


def parameters_of(arrays):
    return [Parameter(Tensor(value.copy()), name=name) for name, value in arrays.items()]


def save(path, arrays=ARRAYS, **meta):
    checkpoint.save(path, parameters_of(arrays), {**META, **meta})
    return path


def save_entries(path, entries):
    """A file of MindSpore's that `checkpoint.save` did not write."""
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in entries.items()], str(path))
    return path


def save_sealed(path, meta_bytes, arrays=ARRAYS):
    """A file whose checksum is right whatever its contents, made with MindSpore alone."""
    save_entries(path, {**arrays, checkpoint.META: np.frombuffer(meta_bytes, np.uint8).copy()})
    before = path.read_bytes()
    digest = np.frombuffer(hashlib.sha256(before).digest(), np.uint8).copy()
    path.write_bytes(before + save_entries(path, {checkpoint.DIGEST: digest}).read_bytes())
    return path


def refusal(path):
    """What is said of a file that cannot be loaded; None where it can."""
    try:
        checkpoint.load(path)
    except UserError as error:
        return str(error)
    return None


def step_at(folder):
    found, warnings = checkpoint.find(folder)
    return found and found.meta["step"], warnings


@pytest.fixture(scope="module")
def net():
    return model.VisionTransformer(CONFIG.model, CONFIG.skip)


# ------------------------------------------------------------------------------------------ there and back


def test_everything_comes_back_bit_for_bit(tmp_path):
    loaded = checkpoint.load(save(tmp_path / "a.ckpt"))
    assert loaded.arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        back = loaded.arrays[name]
        assert (back.dtype, back.shape, back.tobytes()) == (value.dtype, value.shape, value.tobytes()), name
    assert loaded.config == CONFIG
    assert {key: loaded.meta[key] for key in META} == json.loads(json.dumps(META))
    assert loaded.path == tmp_path / "a.ckpt"


def test_it_is_an_ordinary_mindspore_file_with_the_models_names(net, tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, net.get_parameters(), META)
    read = ms.load_checkpoint(str(path))
    weights = {parameter.name: parameter.asnumpy() for parameter in net.get_parameters()}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "head.bias"} < set(weights)
    assert set(read) == {*weights, checkpoint.META, checkpoint.DIGEST}
    for name, value in weights.items():
        np.testing.assert_array_equal(read[name].asnumpy(), value)
    other = model.VisionTransformer(CONFIG.model, (), seed=1)
    left_out = ms.load_param_into_net(other, read)
    assert not (left_out[0] if isinstance(left_out, tuple) else left_out)
    for parameter in other.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])


@pytest.mark.parametrize("classes", [["鸟", "çé", "🐦", "a b"], ["caf\udce9"], ['"', "\\", "\n"], ["x" * 10_000]])
def test_class_names_may_be_anything(classes, tmp_path):
    folder = tmp_path / "ünï 鸟"
    folder.mkdir()
    assert checkpoint.load(save(folder / "a.ckpt", classes=classes)).meta["classes"] == classes


def test_what_is_saved_are_the_values_of_now(tmp_path):
    parameter = Parameter(Tensor(np.zeros(3, np.float32)), name="w")
    checkpoint.save(tmp_path / "a.ckpt", [parameter], META)
    parameter.set_data(Tensor(np.ones(3, np.float32)))
    checkpoint.save(tmp_path / "b.ckpt", [parameter], META)
    assert [checkpoint.load(tmp_path / name).arrays["w"].tolist() for name in ("a.ckpt", "b.ckpt")] == [
        [0] * 3,
        [1] * 3,
    ]


# ------------------------------------------------------------------------------------------------ damage


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    whole = save(tmp_path / "whole.ckpt").read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    generator = random.Random(0)
    places = sorted({*generator.sample(range(len(whole)), 100), *range(24), len(whole) - 1})
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << generator.randrange(8)
        damaged.write_bytes(broken)
        said = refusal(damaged)
        assert said, f"byte {place} of {len(whole)} was changed and nobody noticed"
        assert said.startswith(f"{damaged}: ")
        assert len(said.splitlines()) == 1


def test_a_cut_anywhere_is_noticed(tmp_path):
    """At an entry's end, too, where MindSpore reads what is there and says nothing."""
    whole = save(tmp_path / "whole.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    generator = random.Random(0)
    ends = [place for place in range(1, len(whole)) if whole[place : place + 1] == b"\x0a"][:40]
    for length in sorted({0, 1, len(whole) - 1, *generator.sample(range(len(whole)), 30), *ends}):
        cut.write_bytes(whole[:length])
        assert refusal(cut), f"cut to {length} of {len(whole)} bytes and nobody noticed"


def test_what_another_tool_changed_is_noticed(tmp_path):
    """MindSpore reads a file and writes it again, with and without a change: no longer what the checksum was for."""
    whole = save(tmp_path / "a.ckpt")
    read = {name: value.asnumpy() for name, value in ms.load_checkpoint(str(whole)).items()}
    without = {name: value for name, value in read.items() if name != "half"}
    for entries in (without, {**read, "half": read["half"] + 1}, {**read, "more": np.zeros(1, np.float32)}):
        with pytest.raises(UserError, match=r"b\.ckpt: .*its checksum (does not match|is not at its end)"):
            checkpoint.load(save_entries(tmp_path / "b.ckpt", entries))
    (tmp_path / "c.ckpt").write_bytes(whole.read_bytes() * 2)
    with pytest.raises(UserError, match=r"c\.ckpt: its checksum does not match"):
        checkpoint.load(tmp_path / "c.ckpt")


def test_the_checksum_is_the_last_entry_as_mindspore_would_write_it(tmp_path):
    meta = json.dumps({"format": 1, **META}).encode()
    assert save_sealed(tmp_path / "a.ckpt", meta).read_bytes() == save(tmp_path / "b.ckpt").read_bytes()


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("missing.ckpt", lambda path: None, "no such checkpoint"),
        ("folder.ckpt", lambda path: path.mkdir(), "no such checkpoint"),
        ("empty.ckpt", lambda path: path.touch(), "no checkpoint of skipvit"),
        ("text.ckpt", lambda path: path.write_text("model:\n  depth: 3\n" * 99), "no checkpoint of skipvit"),
        ("zeros.ckpt", lambda path: path.write_bytes(bytes(4096)), "no checkpoint of skipvit"),
        ("pickle.ckpt", lambda path: path.write_bytes(b"\x80\x02}q\x00."), "no checkpoint of skipvit"),
        ("weights.safetensors", lambda path: path.write_bytes(b"\x02\0\0\0\0\0\0\0{}"), "would end in .ckpt"),
        ("foreign.ckpt", lambda path: save_entries(path, {"w": np.zeros(3, np.float32)}), "no checkpoint of skipvit"),
        ("newer.ckpt", lambda path: save(path, format=2), "of format 2, this release reads 1"),
        ("number.ckpt", lambda path: save_sealed(path, b"7"), "cannot be read as a checkpoint"),
        ("no_json.ckpt", lambda path: save_sealed(path, b"{"), "cannot be read as a checkpoint"),
        ("no_config.ckpt", lambda path: save_sealed(path, b'{"format": 1}'), "cannot be read as a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(name, make, said, tmp_path, capfd):
    path = tmp_path / name
    make(path)
    capfd.readouterr()
    with pytest.raises(UserError) as raised:
        checkpoint.load(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", ""), "MindSpore's own complaints"


def test_a_file_with_more_bytes_than_memory_is_not_read(tmp_path):
    path = tmp_path / "vast.ckpt"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    assert "its checksum is not at its end" in refusal(path)
    with open(path, "ab") as file:
        file.write(checkpoint.DIGEST_HEADER + bytes(32))
    assert "more than this machine's free memory" in refusal(path)


def reentered(content, shape, dtype="Float32", value=b"\0\0\0\0"):
    """A checkpoint's entries and one more, as MindSpore would encode it, sealed again."""

    def field(number, payload):
        assert len(payload) < 128
        return bytes([number * 8 + 2, len(payload)]) + payload

    def varint(number):
        return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])

    tensor = b"".join(b"\x08" + varint(size) for size in shape) + field(2, dtype.encode()) + field(3, value)
    before = content[: -checkpoint.DIGEST_ENTRY_BYTES] + field(1, field(1, b"more") + field(2, tensor))
    return before + checkpoint.DIGEST_HEADER + hashlib.sha256(before).digest()


def test_a_sealed_file_with_false_shapes_crashes_nothing(tmp_path):
    """MindSpore's reader copies by the shape, whatever the content's length: a file can end the process."""
    whole, path = save(tmp_path / "whole.ckpt").read_bytes(), tmp_path / "false.ckpt"
    path.write_bytes(reentered(whole, [1]))
    assert checkpoint.load(path).arrays["more"].tolist() == [0.0]
    for shape, dtype in (([2], "Float32"), ([1 << 40], "Float32"), ([1 << 63], "Float32"), ([1], "Float64")):
        path.write_bytes(reentered(whole, shape, dtype))
        assert "cannot be read as a checkpoint of skipvit" in refusal(path)


@pytest.mark.parametrize(
    "meta",
    [{"classes": 7}, {"classes": ["crow", 3]}, {"step": "7"}, {"config": []}, {"best_top1": [1]}, {"ranks": None}],
)
def test_meta_of_other_types_is_refused(meta, tmp_path):
    assert "cannot be read as a checkpoint of skipvit (TypeError)" in refusal(save(tmp_path / "a.ckpt", **meta))


def test_a_model_that_the_file_does_not_hold_is_not_made(tmp_path):
    vast = {**CONFIG.to_dict(), "model": {**CONFIG.to_dict()["model"], "embed_dim": 65_536, "depth": 1000}}
    with pytest.raises(UserError, match=r"a\.ckpt: holds \d+ numbers, fewer than"):
        checkpoint.build_model(checkpoint.load(save(tmp_path / "a.ckpt", config=vast)))


def test_a_configuration_that_this_release_refuses_names_the_file(tmp_path):
    changed = {**CONFIG.to_dict(), "train": {"from_the_future": 1}}
    with pytest.raises(UserError, match=r"a\.ckpt: .*from_the_future"):
        checkpoint.load(save(tmp_path / "a.ckpt", config=changed))


# --------------------------------------------------------------------------------------------- atomic writing


def half_written(entries, path, *_, **__):
    with open(path, "wb") as file:
        file.write(b"half")
    raise RuntimeError("No space left on device")


def failing_fsync(_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("owner", "name", "fails"), [(ms, "save_checkpoint", half_written), (os, "fsync", failing_fsync)]
)
def test_a_failure_leaves_the_old_file_and_no_temporary(owner, name, fails, tmp_path, monkeypatch):
    path = save(tmp_path / "last.ckpt")
    before = runs.contents(tmp_path)
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(OSError, match=r"last\.ckpt: cannot be written: .*(No space|Input/output)"):
        save(path, step=8)
    assert runs.contents(tmp_path) == before


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path):
    """A limit on the size of files stands in for the disk: the write fails in MindSpore's own code."""
    program = """
import resource, signal, sys
from pathlib import Path
import test_checkpoint as here
path = here.save(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    here.save(path, {"w": here.np.ones(100_000, here.np.float32)}, step=8)
except OSError as error:
    print(error)
    sys.exit(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "last.ckpt")],
        env=runs.environment(PYTHONPATH=os.pathsep.join([str(runs.ROOT / "src"), str(runs.ROOT / "tests")])),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    assert "last.ckpt: cannot be written" in ended.stdout
    assert [item.name for item in tmp_path.iterdir()] == ["last.ckpt"]
    assert step_at(tmp_path) == (7, [])


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"last\.ckpt"):
        save(tmp_path / "gone" / "last.ckpt")


# ------------------------------------------------------------------------------------- last and previous


def save_last(folder, step):
    return checkpoint.save_last(folder, parameters_of(ARRAYS), {**META, "step": step})


def test_the_one_before_becomes_previous(tmp_path):
    for step in (1, 2, 3):
        assert save_last(tmp_path, step) == tmp_path / "last.ckpt"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    steps = [checkpoint.load(tmp_path / name).meta["step"] for name in ("last.ckpt", "previous.ckpt")]
    assert steps == [3, 2]


class Killed(BaseException):
    """SIGKILL: nothing of ours runs after it."""


@pytest.mark.parametrize(("saves_before", "damaged"), [(0, False), (1, False), (2, False), (2, True)])
def test_killed_at_any_rename_one_is_left_to_find(saves_before, damaged, tmp_path, monkeypatch):
    """Also where the run went on from previous because last was damaged: that one must not push it out."""
    before = tmp_path / "before"
    before.mkdir()
    for step in range(1, 1 + saves_before):
        save_last(before, step)
    if damaged:
        (before / "last.ckpt").write_bytes(b"damaged")
    whole = saves_before - damaged
    replace = os.replace
    for survives in range(5):
        folder = tmp_path / str(survives)
        shutil.copytree(before, folder)
        left = [survives]

        def replace_until_killed(source, target, left=left):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_until_killed)
        try:
            save_last(folder, 9)
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(os, "replace", replace)
        step, _ = step_at(folder)
        if finished:
            assert step == 9
            return
        assert step in ({whole, 9} if whole else {None, 9}), f"killed at rename {survives}"
    pytest.fail("more than five renames")


def test_find_prefers_last_and_says_when_it_cannot(tmp_path):
    assert step_at(tmp_path) == (None, [])
    save_last(tmp_path, 1)
    assert step_at(tmp_path) == (1, [])
    save_last(tmp_path, 2)
    assert step_at(tmp_path) == (2, [])
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    last.write_bytes(last.read_bytes()[:-1])
    step, warnings = step_at(tmp_path)
    assert step == 1
    assert any(str(last) in line for line in warnings)
    assert any(str(previous) in line for line in warnings)
    last.unlink()
    assert step_at(tmp_path) == (1, [])
    previous.write_bytes(b"")
    with pytest.raises(UserError, match=r"previous\.ckpt"):
        checkpoint.find(tmp_path)


def test_find_goes_round_foreign_files(tmp_path):
    save_last(tmp_path, 1)
    save_last(tmp_path, 2)
    save_entries(tmp_path / "last.ckpt", {"w": np.zeros(3, np.float32)})
    assert step_at(tmp_path)[0] == 1
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").mkdir()
    assert step_at(tmp_path)[0] == 1


# ------------------------------------------------------------------------------------------------ restoring


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda arrays: arrays.update({"head.bias": np.zeros(4, np.float32)}),
            r"head\.bias has shape \(4,\) there and \(3,\)",
        ),
        (lambda arrays: arrays.pop("head.bias"), "has no head.bias"),
        (lambda arrays: arrays.update({"head.bias": np.zeros((), np.float32)}), r"head\.bias has shape \(\) there"),
        (lambda arrays: arrays.update({"head.bias": np.zeros(3, np.int32)}), r"head\.bias is of type int32 there"),
    ],
)
def test_nothing_changes_where_one_does_not_fit(change, said, net, tmp_path):
    before = {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}
    arrays = {name: value + 1 for name, value in before.items()}
    change(arrays)
    with pytest.raises(UserError, match=said):
        checkpoint.restore(net.get_parameters(), arrays, tmp_path / "x.ckpt")
    for parameter in net.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


def test_restore_gives_every_parameter_its_value(net):
    other = model.VisionTransformer(CONFIG.model, CONFIG.skip, seed=1)
    arrays = {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}
    checkpoint.restore(other.get_parameters(), arrays, "x.ckpt")
    for parameter in other.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), arrays[parameter.name])


def test_state_without_axes_is_restored_as_such(tmp_path):
    loaded = checkpoint.load(save(tmp_path / "a.ckpt"))
    parameters = parameters_of({name: np.zeros_like(value) for name, value in ARRAYS.items()})
    checkpoint.restore(parameters, loaded.arrays, loaded.path)
    for parameter in parameters:
        value = ARRAYS[parameter.name]
        assert (parameter.asnumpy().shape, parameter.asnumpy().tobytes()) == (value.shape, value.tobytes())


# ------------------------------------------------------------------------------------------ what is served


def test_the_average_is_served_where_there_is_one(net, tmp_path):
    weights = {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}
    averages = {f"ema.{name}": value + 1 for name, value in weights.items()}
    plain = checkpoint.load(save(tmp_path / "plain.ckpt", weights))
    averaged = checkpoint.load(save(tmp_path / "averaged.ckpt", {**weights, **averages}))
    for loaded, more in ((plain, 0), (averaged, 1)):
        for parameter in checkpoint.build_model(loaded).get_parameters():
            np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name] + np.float32(more))


def test_build_model_is_the_configurations_with_or_without_skipping(net, tmp_path):
    weights = {parameter.name: parameter.asnumpy() for parameter in net.get_parameters()}
    loaded = checkpoint.load(save(tmp_path / "a.ckpt", weights))
    assert checkpoint.build_model(loaded).span_bounds == ((1, 2),)
    assert checkpoint.build_model(loaded, skip=False).span_bounds == ()


def test_weights_of_another_model_are_refused(net, tmp_path):
    weights = {parameter.name: parameter.asnumpy() for parameter in net.get_parameters()}
    wider = {**CONFIG.to_dict(), "model": {**CONFIG.to_dict()["model"], "embed_dim": 32}}
    deeper = {**CONFIG.to_dict(), "model": {**CONFIG.to_dict()["model"], "depth": 3}}
    for other, said in (
        (wider, r"a\.ckpt: cls_token has shape"),
        (deeper, r"a\.ckpt: the checkpoint has no blocks\.2"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.build_model(checkpoint.load(save(tmp_path / "a.ckpt", weights, config=other)))


# ------------------------------------------------------------------------------------- images of another size


def test_position_embeddings_that_fit_are_the_same_arrays():
    arrays = {"pos_embed": np.ones((1, 17, 3), np.float32), "cls_token": np.ones((1, 1, 3), np.float32)}
    fitted = checkpoint.fit_positions(arrays, 16)
    assert all(fitted[name] is arrays[name] for name in arrays)


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 3), (4, 8), (7, 2)])
def test_position_embeddings_are_resampled_as_pictures(old, new):
    """A slope along the rows stays one in between, channels apart, and CLS's is none of it."""
    rows = np.repeat((np.arange(old) + 0.5) / old, old)
    positions = np.stack([rows, 2 - rows, np.full(old * old, 7.0)], axis=-1)
    for name in ("pos_embed", "ema.pos_embed", "adam_m.pos_embed", "accumulated.pos_embed"):
        array = np.concatenate([np.full((1, 1, 3), -9.0), positions[None]], axis=1).astype(np.float32)
        fitted = checkpoint.fit_positions({name: array}, new * new)[name]
        assert (fitted.dtype, fitted.shape) == (np.float32, (1, 1 + new * new, 3))
        np.testing.assert_array_equal(fitted[0, 0], [-9, -9, -9])
        grid = fitted[0, 1:].reshape(new, new, 3)
        np.testing.assert_allclose(grid[:, :, 0], np.tile(grid[:, :1, 0], new), atol=1e-5)  # level along a row
        assert (np.diff(grid[:, 0, 0]) > 0).all()
        np.testing.assert_allclose(grid[:, :, 0] + grid[:, :, 1], 2, atol=1e-5)
        np.testing.assert_allclose(grid[:, :, 2], 7, atol=1e-5)


def test_no_step_is_out_of_proportion_after_resampling():
    """Adam divides by the root of the second moment: it must stay above the first's square."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((1, 65, 5)).astype(np.float32)
    second = first**2 * (1 + generator.random((1, 65, 5)).astype(np.float32))
    for patches in (36, 144, 49, 256):
        fitted = checkpoint.fit_positions({"adam_m.pos_embed": first, "adam_v.pos_embed": second}, patches)
        assert (fitted["adam_v.pos_embed"] >= fitted["adam_m.pos_embed"] ** 2 * (1 - 1e-5)).all()


def test_a_checkpoint_of_an_earlier_phase_is_served_at_the_last_one_s_size(tmp_path):
    recipe = config.from_dict({**runs.RECIPE, "phases": [{"share": 0.5, "image_size": 8}, {"share": 0.5}]})
    recipe = recipe.replace(model=dataclasses.replace(recipe.model, num_classes=2))
    small = model.VisionTransformer(recipe.of_phase(0).model, recipe.skip)
    checkpoint.save(tmp_path / "a.ckpt", small.get_parameters(), {"config": recipe.to_dict(), "classes": ["a", "b"]})
    net = checkpoint.build_model(checkpoint.load(tmp_path / "a.ckpt"))
    assert net.num_patches == runs.PATCH_COUNT
    np.testing.assert_array_equal(net.head.weight.asnumpy(), small.head.weight.asnumpy())
