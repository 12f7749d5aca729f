"""The embedded data set: what is in a picture, what is on the disk, and what happens when things go wrong."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skipvit import clutter
from skipvit.clutter import ClutterConfig, ensure, generate, render
from skipvit.config import UserError

SMALL = ClutterConfig(image_size=32, classes=3, train_images_per_class=4, val_images_per_class=2, seed=5)
# What a child process runs first: the package without its `__init__`, which would bring in MindSpore and take seconds.
CHILD = f"""
import pathlib, sys, time, types
package = types.ModuleType("skipvit")
package.__path__ = [{str(Path(clutter.__file__).parent)!r}]
sys.modules["skipvit"] = package
from skipvit.clutter import ClutterConfig, ensure
cache = pathlib.Path(sys.argv[1])
"""


def files_of(root: Path) -> dict:
    """Every file under `root` with its bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def hidden_entries(folder: Path) -> list:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def grey(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64).mean(axis=2)


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pixels_are_those_of_this_version():
    # Another digest means another data set: raise clutter.VERSION, or old caches and results stand for new pictures.
    digest = hashlib.sha256()
    for class_name in clutter.TEXTURES:
        for split in clutter.SPLITS:
            picture, mask = render(ClutterConfig(), split, class_name, 3)
            digest.update(picture.tobytes() + mask.tobytes())
    assert clutter.VERSION == 2
    assert digest.hexdigest() == "f17177b0f9d32124eb00d41d2b78d1137f58916a8b3d376cdc140454be172664"


def test_render_gives_uint8_of_the_size_asked_for():
    for size in (32, 61, 64):
        picture, mask = render(ClutterConfig(image_size=size), "train", "dots", 0)
        assert picture.shape == (size, size, 3)
        assert mask.shape == (size, size)
        assert picture.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}


def test_render_does_not_depend_on_what_was_drawn_before_nor_on_the_counts():
    first = render(SMALL, "train", "rings", 1)
    np.random.seed(0)
    render(SMALL, "train", "rings", 0)
    again = render(replace(SMALL, train_images_per_class=9, classes=10), "train", "rings", 1)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_needs_neither_mindspore_nor_the_rest_of_the_package():
    script = CHILD + "print(sorted({'mindspore', 'mindcv', 'skipvit.model'} & set(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", script, "."], stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_every_seed_split_class_and_index_gives_its_own_picture():
    pictures = {
        render(replace(SMALL, seed=seed), split, class_name, index)[0].tobytes()
        for seed in (0, 1)
        for split in clutter.SPLITS
        for class_name in ("dots", "grid")
        for index in range(5)
    }
    assert len(pictures) == 2 * 2 * 2 * 5


@pytest.mark.parametrize("class_name", list(clutter.TEXTURES))
def test_mask_is_exactly_the_objects_pixels(class_name, monkeypatch):
    # The negative of the texture changes every pixel of the object and no other: nothing is drawn over it.
    texture = clutter.TEXTURES[class_name]
    for index in range(5):
        picture, mask = render(ClutterConfig(), "train", class_name, index)
        with monkeypatch.context() as patch:
            patch.setitem(clutter.TEXTURES, class_name, lambda y, x: ~texture(y, x))
            negative, same_mask = render(ClutterConfig(), "train", class_name, index)
        assert np.array_equal(mask, same_mask)
        assert np.array_equal((picture != negative).any(axis=2), mask == 255)


def test_object_is_small_and_whole_and_anywhere():
    masks = np.stack([render(ClutterConfig(), "val", "zigzag", index)[1] == 255 for index in range(100)])
    share = masks.mean(axis=(1, 2))
    assert share.min() > 0.02
    assert share.max() < 0.10
    # An object cut off at the edge would show a long straight side there; a whole one only touches it.
    edges = np.stack([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]])
    assert edges.sum(axis=2).max() <= 6
    middles = [(np.argwhere(mask).min(axis=0) + np.argwhere(mask).max(axis=0)) / 2 for mask in masks]
    assert np.min(middles, axis=0).max() < 14
    assert np.max(middles, axis=0).min() > 50
    assert np.std(middles, axis=0).min() > 10


def test_class_can_be_read_from_the_object_and_from_nothing_else():
    # Matched filters: inside the mask the own texture fits best; outside it the texture leaves no trace.
    centres = np.arange(64) + 0.5
    y, x = np.meshgrid(centres, centres, indexing="ij")
    textures = np.stack([texture(y, x) for texture in clutter.TEXTURES.values()])

    def best_fit(picture: np.ndarray, where: np.ndarray) -> int:
        values = grey(picture)[where]
        return int(np.argmax([np.corrcoef(values, texture[where])[0, 1] for texture in textures]))

    assert len(textures) == 10
    inside, outside = [], []
    for number, class_name in enumerate(clutter.TEXTURES):
        for index in range(10):
            picture, mask = render(ClutterConfig(), "val", class_name, index)
            inside.append(best_fit(picture, mask == 255) == number)
            outside.append(best_fit(picture, mask == 0) == number)
    assert np.mean(inside) >= 0.97
    assert np.mean(outside) < 0.25


def test_textures_differ_from_one_another_and_look_the_same_in_a_mirror():
    centres = np.arange(64) + 0.5
    y, x = np.meshgrid(centres, centres, indexing="ij")
    textures = [texture(y, x) for texture in clutter.TEXTURES.values()]
    correlation = np.corrcoef([texture.ravel() for texture in textures])
    assert np.abs(correlation - np.eye(len(textures))).max() < 0.53
    for texture in textures:
        assert np.array_equal(texture, texture[:, ::-1])


def test_what_is_not_the_object_varies():
    # In brightness, from picture to picture and within each one.
    kept = [(grey(p), m == 0) for p, m in (render(ClutterConfig(), "train", "dots", i) for i in range(40))]
    means = [values[away].mean() for values, away in kept]
    spreads = [values[away].std() for values, away in kept]
    assert np.std(means) > 8
    assert min(spreads) > 5


# --- files ----------------------------------------------------------------------------------------------------------


def test_folder_holds_pictures_and_masks_under_parallel_names(tmp_path):
    root = tmp_path / "data"
    generate(root, SMALL)
    expected = {"clutter.json"}
    for split, count in (("train", 4), ("val", 2)):
        for class_name in list(clutter.TEXTURES)[:3]:
            for index in range(count):
                name = f"{split}/{class_name}/{index:06d}.png"
                expected |= {name, f"masks/{name}"}
                picture, mask = render(SMALL, split, class_name, index)
                with Image.open(root / name) as image:
                    assert image.mode == "RGB"
                    assert np.array_equal(np.asarray(image), picture)
                with Image.open(root / "masks" / name) as image:
                    assert image.mode == "L"
                    assert np.array_equal(np.asarray(image), mask)
    assert set(files_of(root)) == expected
    assert hidden_entries(tmp_path) == []
    manifest = json.loads((root / "clutter.json").read_text())
    assert manifest["config"]["seed"] == 5
    assert set(manifest["classes"]) == {path.name for path in (root / "train").iterdir()}


def test_generating_twice_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, config in (("a", SMALL), ("b", SMALL), ("c", replace(SMALL, seed=6))):
        generate(tmp_path / name, config)
    first, second, third = (files_of(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == third.keys()
    assert all(first[name] != third[name] for name in first)


def test_no_validation_picture_is_a_training_picture(tmp_path):
    generate(tmp_path / "data", SMALL)
    files = files_of(tmp_path / "data")
    train = {content for name, content in files.items() if name.startswith("train/")}
    val = {content for name, content in files.items() if name.startswith("val/")}
    assert (len(train), len(val), len(train & val)) == (12, 6, 0)


def test_generate_leaves_an_existing_root_alone(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        generate(root, SMALL)
    assert files_of(tmp_path) == {"data/mine.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError):
        generate(tmp_path / "empty", SMALL)
    assert files_of(tmp_path) == {"data/mine.txt": b"mine"}


def test_generate_leaves_a_root_alone_that_came_to_exist_meanwhile(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write = clutter._write

    def write_while_another_finishes(temporary, config):
        write(temporary, config)
        root.mkdir()
        (root / "theirs.txt").write_text("theirs")

    monkeypatch.setattr(clutter, "_write", write_while_another_finishes)
    with pytest.raises(FileExistsError):
        generate(root, SMALL)
    assert files_of(tmp_path) == {"data/theirs.txt": b"theirs"}
    assert hidden_entries(tmp_path) == []


# --- the cache ------------------------------------------------------------------------------------------------------


def test_ensure_generates_once(tmp_path, monkeypatch):
    root = ensure(SMALL, tmp_path / "new" / "cache")
    assert root.parent == tmp_path / "new" / "cache"
    monkeypatch.setattr(clutter, "generate", lambda *_: pytest.fail("generated again"))
    assert ensure(SMALL, tmp_path / "new" / "cache") == root


def test_every_configuration_has_its_own_folder(tmp_path):
    others = [
        SMALL,
        replace(SMALL, seed=6),
        replace(SMALL, image_size=33),
        replace(SMALL, classes=2),
        replace(SMALL, train_images_per_class=3),
        replace(SMALL, val_images_per_class=1),
    ]
    assert len({ensure(config, tmp_path) for config in others}) == len(others)


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SKIPVIT_CACHE", str(tmp_path / "own"))
    assert ensure(SMALL).parent == tmp_path / "own"
    monkeypatch.delenv("SKIPVIT_CACHE")
    assert ensure(SMALL).parent == tmp_path / "xdg" / "skipvit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ensure(SMALL).parent == tmp_path / "home" / ".cache" / "skipvit"


def test_relative_cache_folder_gives_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPVIT_CACHE", "here")
    root = ensure(SMALL)
    assert root.is_absolute()
    assert root.parent == tmp_path / "here"
    assert ensure(SMALL, Path("here")) == root


def test_two_processes_at_once_both_end_well(tmp_path):
    # Each waits for the file `go`, so both find the cache empty and generate at the same time.
    script = CHILD + (
        "print('ready', flush=True)\n"
        "while not (cache / 'go').exists(): time.sleep(0.001)\n"
        "print(ensure(ClutterConfig(32, 3, 40, 10, 5), cache), flush=True)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    (tmp_path / "go").touch()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert len(files_of(Path(results[0][0].strip()))) == 1 + 2 * 3 * 50
    assert hidden_entries(tmp_path) == []


def test_the_slower_of_two_discards_its_own_and_takes_the_others(tmp_path, monkeypatch):
    write = clutter._write

    def write_while_another_finishes(temporary, config):
        monkeypatch.setattr(clutter, "_write", write)
        ensure(config, tmp_path)
        write(temporary, config)
        assert len(hidden_entries(tmp_path)) == 1

    monkeypatch.setattr(clutter, "_write", write_while_another_finishes)
    root = ensure(SMALL, tmp_path)
    assert len(files_of(root)) == 1 + 2 * 3 * 6
    assert hidden_entries(tmp_path) == []


def test_a_killed_generation_does_not_count_and_is_cleared_away_when_old(tmp_path):
    script = CHILD + "ensure(ClutterConfig(32, 3, 100000, 2, 5), cache)\n"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*/train/*/*.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".clutter-v")

    root = ensure(SMALL, tmp_path)
    assert leftover.is_dir()  # young: it could be another process's, at work
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (long_ago, long_ago))
    assert ensure(SMALL, tmp_path) == root
    assert list(tmp_path.iterdir()) == [root]


def test_only_its_own_leftovers_are_cleared_away(tmp_path):
    long_ago = time.time() - 2 * 24 * 3600
    for name in ("precious.tmp", ".hidden", "clutter-v0-old"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (long_ago, long_ago))
    ensure(SMALL, tmp_path)
    assert {"precious.tmp", ".hidden", "clutter-v0-old"} < {path.name for path in tmp_path.iterdir()}


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_cache_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError) as caught:
            ensure(SMALL, cache)
        message = str(caught.value)
        assert str(cache) in message
        assert "SKIPVIT_CACHE" in message
        assert "\n" not in message


def test_full_disk_is_a_users_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    save = Image.Image.save
    saved = []

    def save_until_full(image, path, *arguments, **options):
        if len(saved) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        save(image, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    with pytest.raises(UserError, match=r"No space left.*SKIPVIT_CACHE"):
        ensure(SMALL, tmp_path)
    assert len(saved) == 7
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(clutter, "_write_png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: (root / "train/stripes_vertical/000001.png").unlink(), "train/stripes_vertical"),
        (lambda root: (root / "masks/val/bands_horizontal/000000.png").write_bytes(b""), "masks/val/bands_horizontal"),
        (lambda root: (root / "masks").rename(root / "gone"), "masks/train/stripes_horizontal"),
        (lambda root: (root / "clutter.json").unlink(), "clutter.json"),
        (lambda root: (root / "clutter.json").write_text("{"), "clutter.json"),
        (lambda root: (root / "clutter.json").write_text("{}"), "clutter.json"),
    ],
)
def test_damaged_data_set_is_named_and_not_used(tmp_path, damage, named):
    root = ensure(SMALL, tmp_path)
    damage(root)
    before = files_of(root)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        ensure(SMALL, tmp_path)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of(root) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 31},
        {"classes": 1},
        {"classes": 11},
        {"train_images_per_class": 0},
        {"val_images_per_class": 0},
        {"seed": -1},
        {"seed": 0.5},
        {"classes": True},
    ],
)
def test_configuration_out_of_range_is_a_users_error(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name}.*whole number from"):
        ClutterConfig(**wrong)
