"""The data path: folders, reading, augmentation, batches, and that every random choice has a key of its own."""

import dataclasses
import os
import re
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindcv.data.mixup import Mixup
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from skipvit import data
from skipvit.config import AugmentConfig, Config, DataConfig, SkipConfig, UserError, model_config
from skipvit.data import EvalBatches, ImageFolder, TrainBatches, UnreadableCount, UnreadableImage

PLAIN = AugmentConfig(crop="none", horizontal_flip=0.0)
EVERYTHING = AugmentConfig(
    rand_augment_magnitude=9.0, erase=0.25, mixup=0.8, cutmix=1.0, mix_probability=0.9, label_smoothing=0.1
)
ALONE = dataclasses.replace(EVERYTHING, mixup=0.0, cutmix=0.0)  # what happens to each image by itself
IMAGE_COUNT = 26  # of the coded folder: 3 batches of 8, and 2 images left over


def make_config(augment=PLAIN, size=16, seed=0, **data_options):
    config = Config(
        model=model_config(image_size=size, patch_size=8),
        data=DataConfig(**{"num_workers": 1, **data_options}),
        augment=augment,
    )
    return config.replace(train=dataclasses.replace(config.train, seed=seed))


def save_noise(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Images of one colour whose red tells which they are: 5 × index."""
    root = tmp_path_factory.mktemp("coded")
    for index in range(IMAGE_COUNT):
        folder = root / "abc"[index * 3 // IMAGE_COUNT]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (11, 13), (5 * index, 100, 200)).save(folder / f"{index:02d}.png")
    folder = ImageFolder(root)
    assert [int(name[2:4]) for name in folder.names] == list(range(IMAGE_COUNT))
    return folder


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Images of many sizes full of detail, so that any difference in what is done to them shows."""
    root = tmp_path_factory.mktemp("noisy")
    for index in range(IMAGE_COUNT):
        save_noise(root / "abc"[index % 3] / f"{index:02d}.jpg", (37 + index, 61 - index), index)
    return ImageFolder(root)


def shown(images):
    """The indices of coded images, told from their pixels."""
    return (images[:, 0, 5, 7] / 5).astype(int).tolist()


def all_items(source):
    return [source[index] for index in range(len(source))]


def assert_equal_items(one, other):
    assert len(one) == len(other) > 0
    for row, other_row in zip(one, other):
        assert len(row) == len(other_row)
        for column, other_column in zip(row, other_row):
            assert column.dtype == other_column.dtype
            np.testing.assert_array_equal(column, other_column)


# ---------------------------------------------------------------------------------------------------- folders


def test_folder_lists_images_by_class_then_name(tmp_path):
    for name in ("b/2.PNG", "b/10.jpeg", "a-b/x.Tiff", "a/deep/er/y.gif", "a/z.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("b/.hidden.png", ".git/c.png", "b/notes.txt", "stray.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert folder.classes == ("a", "a-b", "b")
    assert folder.names == ["a/deep/er/y.gif", "a/z.webp", "a-b/x.Tiff", "b/10.jpeg", "b/2.PNG"]
    assert folder.labels.tolist() == [0, 0, 1, 2, 2]
    assert folder.path(3) == tmp_path / "b/10.jpeg"
    assert len(folder) == 5


def test_folder_follows_links_but_no_loops_and_opens_no_pipes(tmp_path):
    save_noise(tmp_path / "outside.png", (3, 3), 0)
    inner = tmp_path / "root" / "a" / "inner"
    inner.mkdir(parents=True)
    (inner / "back").symlink_to(tmp_path / "root" / "a")
    (inner / "linked.png").symlink_to(tmp_path / "outside.png")
    (inner / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (inner / "itself.png").symlink_to("itself.png")
    os.mkfifo(inner / "pipe.png")
    save_noise(tmp_path / "elsewhere" / "x.png", (3, 3), 0)
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    folder = ImageFolder(tmp_path / "root")
    assert folder.names == [
        "a/inner/dangling.png",
        "a/inner/itself.png",
        "a/inner/linked.png",
        "a/inner/pipe.png",
        "b/x.png",
    ]
    assert data.read_image(folder.path(2)).shape == (3, 3, 3)
    for index, reason in ((0, "No such file"), (1, "symbolic links"), (3, "a pipe, socket or device, not a file")):
        with pytest.raises(UnreadableImage, match=reason):
            data.read_image(folder.path(index))


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ([], "missing", r"data\.val: .*missing does not exist"),
        (["file"], "file", "is a file, not a folder"),
        (["x.png"], ".", "holds no class folders"),
        (["a/x.png", "b/x.txt", "c/.x.png"], ".", "class folders without images: b, c;"),
        (["train/a/x.png", "val/a/x.png"], ".", "holds train/ and val/; give .*train"),
    ],
)
def test_folder_errors_are_one_line(tmp_path, files, given, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message) as caught:
        ImageFolder(tmp_path / given, "data.val")
    assert "\n" not in str(caught.value)


def test_fingerprint_is_of_names_wherever_they_lie(tmp_path, coded):
    shutil.copytree(coded.root, tmp_path / "copy")
    assert ImageFolder(tmp_path / "copy").fingerprint() == coded.fingerprint()
    (tmp_path / "copy" / "a" / "00.png").rename(tmp_path / "copy" / "b" / "00.png")
    assert ImageFolder(tmp_path / "copy").fingerprint() != coded.fingerprint()
    assert coded.fingerprint().startswith("26 images, sha256 ")


def test_classes_that_differ_are_named(tmp_path, coded):
    for name in ("a", "b", *(f"new{index}" for index in range(7))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    with pytest.raises(UserError, match=r"has c; .* new0, new1, new2, new3, new4 and 2 more"):
        data.check_same_classes(coded, ImageFolder(tmp_path))
    data.check_same_classes(coded, coded)


def test_resolve_folders(tmp_path, coded, monkeypatch):
    given = make_config(train=str(coded.root), val=str(coded.root))
    folders = data.resolve_folders(given)
    assert (folders.train.root, folders.val.root, folders.masks) == (coded.root, coded.root, None)
    with pytest.raises(UserError, match=r"data\.val: not given"):
        data.resolve_folders(make_config(train=str(coded.root)))
    with pytest.raises(UserError, match=r"data\.masks: .* is not a folder"):
        data.resolve_folders(make_config(train=str(coded.root), val=str(coded.root), masks="/nowhere"))
    with pytest.raises(UserError, match=r"num_classes: 2 is fewer than the 3"):
        data.resolve_folders(given.replace(model=dataclasses.replace(given.model, num_classes=2)))

    for part in ("train", "val", "masks/val"):
        shutil.copytree(coded.root, tmp_path / part)
    monkeypatch.setattr(data.clutter, "ensure", lambda: tmp_path)
    folders = data.resolve_folders(make_config(train="clutter"))
    assert (folders.train.root, folders.val.root) == (tmp_path / "train", tmp_path / "val")
    assert folders.masks == tmp_path / "masks" / "val"
    other = data.resolve_folders(make_config(train="clutter", val=str(coded.root)))
    assert (other.val.root, other.masks) == (coded.root, None)  # the generated masks are not of these images


# ---------------------------------------------------------------------------------------------------- reading


def read(tmp_path, image, suffix, **options):
    image.save(tmp_path / f"image{suffix}", **options)
    return data.read_image(tmp_path / f"image{suffix}")


def test_rgb_and_grey_come_back_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for suffix in (".png", ".bmp", ".tif"):
        np.testing.assert_array_equal(read(tmp_path, Image.fromarray(pixels), suffix), pixels)
    lossless = read(tmp_path, Image.fromarray(pixels), ".webp", lossless=True)
    np.testing.assert_array_equal(lossless, pixels)
    grey = read(tmp_path, Image.fromarray(pixels[:, :, 0]), ".png")
    np.testing.assert_array_equal(grey, pixels[:, :, :1].repeat(3, axis=2))
    black_white = read(tmp_path, Image.fromarray(pixels[:, :, 0]).convert("1"), ".png")
    assert set(np.unique(black_white)) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 129], [257 * 100, 40000, 65535]], np.uint16)
    expected = np.array([[0, 0, 1], [100, 156, 255]])
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(values), suffix)[:, :, 1], expected)


def test_values_without_a_scale_are_refused(tmp_path):
    for values in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70000, np.int32)):
        with pytest.raises(UnreadableImage, match="no known scale"):
            read(tmp_path, Image.fromarray(values), ".tif")


def test_cmyk_has_the_right_sign(tmp_path):
    ink = Image.new("CMYK", (16, 16), (0, 230, 255, 20))  # little cyan, much magenta and yellow: red
    inverted = read(tmp_path, ink, ".jpg", quality=95)
    assert b"Adobe" in (tmp_path / "image.jpg").read_bytes()  # whose CMYK is stored inverted
    upright = read(tmp_path, ink, ".tif")
    np.testing.assert_array_equal(upright[0, 0], [235, 23, 0])
    assert np.abs(inverted.astype(int) - upright).max() <= 4


def test_palette_and_transparency_are_laid_on_white(tmp_path):
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    pixels = read(tmp_path, palette, ".png")
    assert (pixels[0, 0].tolist(), pixels[1, 3].tolist()) == ([10, 20, 30], [200, 100, 50])
    pixels = read(tmp_path, palette, ".png", transparency=0)
    assert (pixels[0, 0].tolist(), pixels[1, 3].tolist()) == ([255, 255, 255], [200, 100, 50])
    half = read(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 200, 51)), ".png")  # a fifth opaque
    assert half[0, 0].tolist() == [204, 204, 244]
    grey = read(tmp_path, Image.new("LA", (2, 2), (100, 0)), ".png")
    assert grey[0, 0].tolist() == [255, 255, 255]
    keyed = read(tmp_path, Image.new("RGB", (2, 2), (9, 8, 7)), ".png", transparency=(9, 8, 7))
    assert keyed[0, 0].tolist() == [255, 255, 255]


# EXIF's definition: the visual side at which the stored 0th row and the stored 0th column lie.
EXIF_SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", EXIF_SIDES)
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    row_side, column_side = EXIF_SIDES[orientation]
    stored = upright if row_side in ("top", "bottom") else upright.swapaxes(0, 1)
    if row_side in ("bottom", "right"):
        stored = stored[::-1]
    if column_side in ("bottom", "right"):
        stored = stored[:, ::-1]
    exif = Image.Exif()
    exif[data.EXIF_ORIENTATION] = orientation
    camera = Image.fromarray(np.ascontiguousarray(stored))
    for suffix in (".png", ".tif"):
        np.testing.assert_array_equal(read(tmp_path, camera, suffix, exif=exif), upright)
    lossy = read(tmp_path, camera, ".jpg", exif=exif, quality=95, subsampling=0)
    assert np.abs(lossy.astype(int) - upright).mean() < 3


def test_broken_exif_does_not_cost_the_image(tmp_path):
    pixels = read(tmp_path, Image.new("RGB", (8, 8), (0, 255, 0)), ".jpg", exif=b"Exif\0\0no such thing")
    assert pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    pixels = read(tmp_path, frames[0], suffix, save_all=True, append_images=frames[1:])
    assert pixels[4, 4, 0] > 250
    assert pixels[4, 4, 2] < 5


def test_one_pixel_goes_through_both_transforms(tmp_path):
    image = Image.fromarray(read(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)), ".png"))
    for augment in (PLAIN, dataclasses.replace(PLAIN, crop="random_resized"), dataclasses.replace(PLAIN, crop="shift")):
        config = make_config(augment, val_crop_ratio=0.875)
        assert data.augment_image(np.asarray(image), config, data.keyed_generator(1)).shape == (3, 16, 16)
    assert data.evaluation_image(image, config)[:, 3, 5].tolist() == [1, 2, 3]


def png_without_pixels(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_says_which_and_why(tmp_path):
    save_noise(tmp_path / "whole.jpg", (64, 64), 0)
    save_noise(tmp_path / "whole.png", (64, 64), 0)
    jpeg, png = ((tmp_path / name).read_bytes() for name in ("whole.jpg", "whole.png"))
    wrong_byte = bytearray(png)
    wrong_byte[len(png) // 2] ^= 255
    contents = {
        "empty.jpg": (b"", "no image of a known format"),
        "text.jpg": (b"I am no image.\n" * 50, "no image of a known format"),
        "short.jpg": (jpeg[:2000], "truncated"),
        "short.png": (png[:2000], "truncated"),
        "wrong.png": (bytes(wrong_byte), "broken|CRC|unrecognized"),
        "vast.png": (png_without_pixels(100_000, 100_000), "decompression bomb"),
        "large.png": (png_without_pixels(10_000, 9_000), "10000 by 9000 pixels are more than 89478485"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage) as caught:
            data.read_image(tmp_path / name)
        assert re.search(reason, caught.value.reason), caught.value.reason
        assert str(caught.value) == f"{tmp_path / name}: cannot be read as an image ({caught.value.reason})"
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(UnreadableImage, match="Is a directory"):
        data.read_image(tmp_path)


def test_a_jpeg_may_be_decoded_smaller_but_not_too_small(tmp_path):
    gradient = np.linspace(0, 255, 1000 * 1600).reshape(1000, 1600).astype(np.uint8)
    Image.fromarray(gradient).convert("RGB").save(tmp_path / "large.jpg", quality=95)
    full = data.read_image(tmp_path / "large.jpg")
    assert full.shape == (1000, 1600, 3)
    for least_side, shape in (
        (1000, (1000, 1600, 3)),
        (501, (1000, 1600, 3)),
        (500, (500, 800, 3)),
        (9, (125, 200, 3)),
    ):
        reduced = data.read_image(tmp_path / "large.jpg", least_side)
        assert reduced.shape == shape
        step = 1000 // shape[0]
        expected = full.reshape(shape[0], step, shape[1], step, 3).mean(axis=(1, 3))
        assert np.abs(reduced - expected).max() < 4
    # The smallest crop that training can draw still has the output's pixels.
    config = make_config(AugmentConfig(), size=224)
    side = data.least_training_side(config)
    assert math_side(side, config.augment) >= 224 > math_side(side - 2, config.augment)


@pytest.mark.parametrize(
    "kind", ["colour", "small", "not subsampled", "progressive", "grey", "cmyk", "turned", "cut", "text"]
)
def test_simplejpeg_and_pillow_give_the_same_bytes(tmp_path, monkeypatch, kind):
    pytest.importorskip("simplejpeg")
    pixels = picture_of(3, 5) if kind == "small" else picture_of(75, 101)
    image = Image.fromarray(pixels).convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    options = {"not subsampled": {"subsampling": 0}, "progressive": {"progressive": True}}.get(kind, {})
    if kind == "turned":
        exif = Image.Exif()
        exif[data.EXIF_ORIENTATION] = 6
        options = {"exif": exif}
    path = tmp_path / "image.jpg"
    image.save(path, **options)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "text":
        path.write_bytes(b"\xff\xd8\xff and nothing more")
    decoded = data._plain_jpeg(path, None)
    assert (decoded is not None) == (kind in ("colour", "small", "not subsampled", "progressive"))
    if kind in ("cut", "text"):
        with pytest.raises(UnreadableImage):
            data.read_image(path)
        return
    with_it = data.read_image(path)
    monkeypatch.setattr(data, "simplejpeg", None)
    np.testing.assert_array_equal(data.read_image(path), with_it)
    reduced = data.read_image(path, 37)
    monkeypatch.undo()
    np.testing.assert_array_equal(data.read_image(path, 37), reduced)


def math_side(side, augment):
    """The shorter side of the smallest, narrowest crop of a square image."""
    return np.sqrt(side * side * augment.crop_scale[0] * augment.crop_ratio[0])


# ------------------------------------------------------------------------------------------------- one image


def test_evaluation_resizes_the_shorter_side_and_takes_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    image = Image.fromarray(pixels)
    config = make_config(size=16, val_crop_ratio=0.8)
    expected = np.asarray(image.resize((36, 20), Image.Resampling.BICUBIC))[2:18, 10:26].transpose(2, 0, 1)
    np.testing.assert_array_equal(data.evaluation_image(image, config), expected)
    tall = np.asarray(image.transpose(Image.Transpose.TRANSPOSE).resize((20, 36), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        data.evaluation_image(image.transpose(Image.Transpose.TRANSPOSE), config),
        tall[10:26, 2:18].transpose(2, 0, 1),
    )
    small = Image.fromarray(pixels[:16, :16])
    np.testing.assert_array_equal(
        data.evaluation_image(small, make_config(val_crop_ratio=1.0)), pixels[:16, :16].transpose(2, 0, 1)
    )


def test_interpolation_is_the_configured_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))
    bicubic, bilinear = (
        data.evaluation_image(image, make_config(interpolation=name)) for name in ("bicubic", "bilinear")
    )
    assert (bicubic != bilinear).any()


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    low=st.floats(0.01, 1.0),
    ratio=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_a_random_box_lies_in_its_image(width, height, low, ratio, seed):
    augment = AugmentConfig(crop_scale=(low, 1.0), crop_ratio=(ratio, 1 / ratio))
    left, top, right, bottom = data.random_resized_box((width, height), augment, data.keyed_generator(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_boxes_have_the_area_and_aspect_asked_for():
    generator = data.keyed_generator(0)
    augment = AugmentConfig(crop_scale=(0.2, 0.4), crop_ratio=(0.5, 2.0))
    boxes = np.array([data.random_resized_box((1000, 700), augment, generator) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = widths * heights / 700_000, np.log(widths / heights)
    assert 0.198 < areas.min() < 0.205
    assert 0.395 < areas.max() < 0.402
    assert abs(areas.mean() - 0.3) < 0.01
    assert np.abs(ratios).max() < np.log(2.01)
    assert abs(ratios.mean()) < 0.05
    assert boxes[:, 0].min() < 20
    assert boxes[:, 2].max() > 980
    # An image so narrow that no try fits: the largest central box within the bounds.
    assert data.random_resized_box((10, 1000), augment, generator) == (0, 490, 10, 510)
    assert data.random_resized_box((1000, 10), augment, generator) == (490, 0, 510, 10)


def test_random_resized_crop_shows_what_lies_in_the_box():
    ramp = np.arange(200, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2)
    config = make_config(AugmentConfig(crop_scale=(0.1, 0.1), crop_ratio=(1.0, 1.0), horizontal_flip=0.0), size=16)
    box = data.random_resized_box((200, 100), config.augment, data.keyed_generator(5))
    pixels = data.augment_image(ramp, config, data.keyed_generator(5))
    centres = box[0] + (np.arange(16) + 0.5) * (box[2] - box[0]) / 16 - 0.5
    assert np.abs(pixels[1] - centres).max() < 2


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(90, 200), (120, 70), (5, 9), (1, 1)])
def test_resizing_is_pillows(name, shape):
    picture, size = picture_of(*shape), 32
    resized = data.resize(picture[:, ::-1], size, data.RESAMPLING[name])
    expected = np.asarray(
        Image.fromarray(picture[:, ::-1]).resize((size, size), getattr(Image.Resampling, name.upper()))
    )
    difference = np.abs(resized.astype(int) - expected)
    # To the byte, save where Pillow's later releases begin with the other direction.
    assert difference.max() == 0 or (shape == (120, 70) and difference.max() <= 3 and difference.mean() < 0.5)


def test_shift_moves_by_whole_pixels_onto_black():
    pixels = np.random.default_rng(0).integers(1, 256, (16, 16, 3), np.uint8)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0))).transpose(2, 0, 1)
    config = make_config(AugmentConfig(crop="shift", shift_pixels=2, horizontal_flip=0.0))
    seen = set()
    for seed in range(300):
        moved = data.augment_image(pixels, config, data.keyed_generator(seed))
        offsets = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if (moved == padded[:, row : row + 16, column : column + 16]).all()
        ]
        assert len(offsets) == 1
        seen.add(offsets[0])
    assert len(seen) == 25


def test_flip_has_its_probability():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    upright = pixels.transpose(2, 0, 1)
    config = make_config(AugmentConfig(crop="none", horizontal_flip=0.3))
    flipped = 0
    for seed in range(500):
        image = data.augment_image(pixels, config, data.keyed_generator(seed))
        is_flipped = (image == upright[:, :, ::-1]).all()
        assert is_flipped or (image == upright).all()
        flipped += is_flipped
    assert 110 < flipped < 190


def test_erasing_covers_its_area_with_noise_of_the_datas_mean_and_spread():
    config = make_config(dataclasses.replace(PLAIN, erase=0.4), size=64, mean=(0.3, 0.5, 0.6), std=(0.1, 0.15, 0.05))
    plain = np.full((64, 64, 3), (1, 254, 2), np.uint8)
    erased, noise, areas = 0, [], []
    for seed in range(400):
        image = data.augment_image(plain, config, data.keyed_generator(seed))
        changed = (image != np.array([1, 254, 2])[:, None, None]).any(axis=0)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
            box = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert changed.sum() > 0.95 * box[0].size  # one rectangle
            erased += 1
            areas.append(box[0].size / 64**2)
            noise.append(box.reshape(3, -1))
    assert 120 < erased < 200
    assert 0.015 < min(areas) < 0.06
    assert 0.28 < max(areas) < 0.35
    noise = np.concatenate(noise, axis=1) / 255
    np.testing.assert_allclose(noise.mean(axis=1), [0.3, 0.5, 0.6], atol=0.005)
    np.testing.assert_allclose(noise.std(axis=1), [0.1, 0.15, 0.05], atol=0.005)


# ---------------------------------------------------------------------------------------------- RandAugment


def affine(*matrix):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)
    )


def enhance(kind, factor):
    return lambda image: kind(image).enhance(factor)


# At severity 0.9, timm's operation with sign + and with sign -, by Pillow; shifts in an image 40 wide and 60 high.
PILLOW = {
    "AutoContrast": (ImageOps.autocontrast,) * 2,
    "Equalize": (ImageOps.equalize,) * 2,
    "Invert": (ImageOps.invert,) * 2,
    "Rotate": tuple(
        lambda image, angle=angle: image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
        for angle in (27, -27)
    ),
    "Posterize": (lambda image: ImageOps.posterize(image, 1),) * 2,
    "Solarize": (lambda image: ImageOps.solarize(image, 26),) * 2,
    "SolarizeAdd": (lambda image: image.point([min(255, v + 99) if v < 128 else v for v in range(256)] * 3),) * 2,
    "Color": (enhance(ImageEnhance.Color, 1.81), enhance(ImageEnhance.Color, 0.19)),
    "Contrast": (enhance(ImageEnhance.Contrast, 1.81), enhance(ImageEnhance.Contrast, 0.19)),
    "Brightness": (enhance(ImageEnhance.Brightness, 1.81), enhance(ImageEnhance.Brightness, 0.19)),
    "Sharpness": (enhance(ImageEnhance.Sharpness, 1.81), enhance(ImageEnhance.Sharpness, 0.19)),
    "ShearX": (affine(1, 0.27, 0, 0, 1, 0), affine(1, -0.27, 0, 0, 1, 0)),
    "ShearY": (affine(1, 0, 0, 0.27, 1, 0), affine(1, 0, 0, -0.27, 1, 0)),
    "TranslateX": (affine(1, 0, -16, 0, 1, 0), affine(1, 0, 16, 0, 1, 0)),
    "TranslateY": (affine(1, 0, 0, 0, 1, -24), affine(1, 0, 0, 0, 1, 24)),
}


def picture_of(height, width):
    """Ramps in different directions, with some grain."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramps = np.stack([columns, rows, (rows + columns) / 2], axis=-1) * 180 + 20
    return (ramps + np.random.default_rng(1).normal(0, 12, ramps.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "operation", "arguments"), data.RAND_AUGMENT, ids=[row[0] for row in data.RAND_AUGMENT]
)
def test_each_operation_is_pillows_and_repeats(name, operation, arguments):
    severity = {"TranslateX": 16 / 40 / 0.45, "TranslateY": 24 / 60 / 0.45}.get(name, 0.9)  # whole pixels
    picture = picture_of(60, 40)
    options = {"fill_value": (124, 116, 104), "resample": data.RESAMPLING["bicubic"]}

    def apply(sign):
        return operation(picture.copy(), *arguments(severity, sign), **options)

    for sign, reference in zip((1, -1), PILLOW[name]):
        result = apply(sign)
        expected = np.asarray(reference(Image.fromarray(picture)))
        assert result.shape == picture.shape
        assert result.dtype == np.uint8
        assert np.abs(expected.astype(int) - picture).mean() > 4  # the operation does something
        # Equalize's table is rounded in another way, which tells in a picture as small as this; OpenCV's bicubic is
        # less sharp than Pillow's, which tells in its grain.
        allowed = {"Equalize": 6.0, "Rotate": 1.5, "ShearX": 1.1}
        assert np.abs(result.astype(int) - expected).mean() < allowed.get(name, 1.0)
        with ThreadPoolExecutor(4) as pool:
            for again in pool.map(apply, [sign] * 40):
                np.testing.assert_array_equal(again, result)


@pytest.mark.parametrize("name", data.MOVING)
def test_moves_go_where_pillows_go(name):
    """On ramps a fifth of a pixel off would make a level in the mean, whatever the kernel."""
    rows, columns = np.mgrid[0:60, 0:40]
    picture = np.stack([20 + 5 * columns, 20 + 3 * rows, 20 + 2 * columns + 2 * rows], axis=-1).astype(np.uint8)
    (operation, arguments) = next(row[1:] for row in data.RAND_AUGMENT if row[0] == name)
    for sign, reference in zip((1, -1), PILLOW[name]):
        severity = {"TranslateX": 16 / 40 / 0.45, "TranslateY": 24 / 60 / 0.45}.get(name, 0.9)
        drawn = arguments(severity, sign)
        result = operation(picture, *drawn, fill_value=(124, 116, 104), resample=data.RESAMPLING["bicubic"])
        covered = operation(np.zeros_like(picture), *drawn, fill_value=(255,) * 3, resample=data.RESAMPLING["bicubic"])
        inside = ndimage.maximum_filter(covered[..., 0], 7) == 0  # away from the filled corners
        inside[:4], inside[-4:], inside[:, :4], inside[:, -4:] = False, False, False, False
        assert inside.sum() > 400
        expected = np.asarray(reference(Image.fromarray(picture))).astype(int)
        difference = (result - expected)[inside]
        assert np.abs(difference).max() <= 2
        assert np.abs(difference.mean(axis=0) - 0.25).max() < 0.4  # Pillow cuts off what OpenCV rounds


def test_severity_grows_from_next_to_nothing():
    picture = picture_of(64, 64)
    for name, operation, arguments in data.RAND_AUGMENT:
        if name in ("AutoContrast", "Equalize", "Invert"):
            continue
        changes = []
        for severity in (0.0, 0.5, 1.0):
            result = operation(
                picture,
                *arguments(severity, -1),
                fill_value=(124, 116, 104),
                resample=data.RESAMPLING["bilinear"],
            )
            changes.append(np.abs(result.astype(int) - picture).mean())
        assert changes[0] < (8 if name == "Posterize" else 0.7), name  # timm's too keeps 4 bits at severity 0
        assert changes[0] < changes[1] < changes[2], name


def test_operations_signs_and_magnitudes_are_drawn_as_timm_draws_them(monkeypatch):
    calls = []

    def record(name):
        return name, lambda image, *arguments, **_: calls.append(arguments) or image, lambda *drawn: (name, *drawn)

    monkeypatch.setattr(data, "RAND_AUGMENT", tuple(record(row[0]) for row in data.RAND_AUGMENT))
    config = make_config(AugmentConfig(rand_augment_magnitude=9.0, rand_augment_std=0.5, rand_augment_layers=3))
    for seed in range(2000):
        data.rand_augment([np.zeros((8, 8, 3), np.uint8)], config, data.keyed_generator(seed))
    names, severities, signs = zip(*calls)
    assert 2850 < len(calls) < 3150  # of 6000 drawn, half are applied
    counts = [names.count(name) for name in PILLOW]
    assert min(counts) > 150
    assert max(counts) < 250
    assert 0.45 < np.mean(np.array(signs) == 1) < 0.55
    assert set(signs) == {1, -1}
    assert abs(np.mean(severities) - 0.9) < 0.005
    assert 0.04 < np.std(severities) < 0.055
    assert max(severities) == 1.0  # clipped


# ---------------------------------------------------------------------------------------------------- mixing


class LegacyDraws:
    """np.random's own stream behind a Generator's names."""

    def __init__(self, seed):
        state = np.random.RandomState(seed)
        self.random, self.beta, self.integers = state.rand, state.beta, state.randint


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_mindcvs_with_another_source_of_draws(mixup, cutmix):
    augment = AugmentConfig(mixup=mixup, cutmix=cutmix, mix_probability=0.9, label_smoothing=0.1)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 24), np.uint8)
    labels = np.array([0, 4, 2, 2, 1, 3], np.int32)
    theirs = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, prob=0.9, label_smoothing=0.1, num_classes=5)
    state = np.random.get_state()
    for seed in range(40):
        np.random.seed(seed)
        expected_images, expected_targets = theirs(images.astype(np.float32), labels)
        mixed, targets = data.mix_batch(images.copy(), labels, augment, 5, LegacyDraws(seed))
        np.testing.assert_array_equal(mixed, np.rint(expected_images).astype(np.uint8))
        np.testing.assert_array_equal(targets, expected_targets)
        assert mixed.dtype == np.uint8
        assert targets.dtype == np.float32
    np.random.set_state(state)


def test_without_mixing_targets_are_smoothed():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), np.uint8)
    augment = AugmentConfig(label_smoothing=0.1)
    mixed, targets = data.mix_batch(images, np.array([2, 0, 1]), augment, 5, data.keyed_generator(0))
    np.testing.assert_array_equal(mixed, images)
    expected = np.full((3, 5), 0.02)
    expected[[0, 1, 2], [2, 0, 1]] = 0.92
    np.testing.assert_allclose(targets, expected, atol=1e-7)


def test_odd_batches_mix_and_one_image_meets_itself():
    augment = AugmentConfig(mixup=0.8, cutmix=1.0)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), np.uint8)
    changed = np.zeros(5)
    for seed in range(30):
        mixed, targets = data.mix_batch(images.copy(), np.arange(5), augment, 5, data.keyed_generator(seed))
        changed += (mixed != images).any(axis=(1, 2, 3))
        np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
        assert targets[2, 2] == pytest.approx(1)
        alone, target = data.mix_batch(images[:1].copy(), np.array([3]), augment, 5, data.keyed_generator(seed))
        np.testing.assert_array_equal(alone, images[:1])
        assert target[0, 3] == pytest.approx(1)
    assert changed[2] == 0
    assert changed[[0, 1, 3, 4]].min() > 20


def test_batches_are_really_mixed_by_both_at_about_their_rate(coded):
    augment = dataclasses.replace(PLAIN, mixup=0.8, cutmix=1.0, mix_probability=0.75)
    source = TrainBatches(coded, make_config(augment), batch_size=8, epochs=100)
    cut, blended, mixed_labels, label_pairs = 0, 0, 0, 0
    for index in range(len(source)):
        images, targets = source[index]
        colours = [len(np.unique(image[0])) for image in images]
        own = 5 * source.samples(index)
        cut += max(colours) == 2
        blended += max(colours) == 1 and (images[:, 0, 0, 0] != own).any()
        labels = coded.labels[source.samples(index)]
        different = labels != labels[::-1]
        label_pairs += different.sum()
        mixed_labels += ((targets[different] > 0).sum(axis=1) == 2).sum()
        # What the label says is what the picture shows.
        if max(colours) == 2:
            kept = (images[0, 0] == own[0]).mean()
            if labels[0] != labels[-1] and own[0] != own[-1]:
                assert targets[0, labels[0]] == pytest.approx(kept, abs=1e-5)
    assert len(source) == 300
    assert 80 < cut < 145  # 112 expected; a few boxes are empty
    assert 80 < blended < 145  # a few shares round to no change
    assert label_pairs > 1000
    assert 0.66 < mixed_labels / label_pairs < 0.8


# -------------------------------------------------------------------------------------------------- drop path


def test_drop_path_factors():
    model = model_config(depth=5, drop_path=0.4)
    factors = data.drop_path_factors(model, seed=0, step=7, rank=1, batch_size=4000)
    assert factors.shape == (5, 2, 4000)
    assert factors.dtype == np.float32
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        for branch in factors[block]:
            assert set(np.unique(branch)) <= {np.float32(0), np.float32(1 / (1 - rate))}
            assert abs((branch == 0).mean() - rate) < 0.03
            assert abs(branch.mean() - 1) < 0.05
    np.testing.assert_array_equal(factors, data.drop_path_factors(model, seed=0, step=7, rank=1, batch_size=4000))
    assert not (factors[2, 0] == factors[2, 1]).all()
    assert ((factors[1] == 0) & (factors[4] > 0)).any()  # blocks draw apart
    for other in ({"seed": 1}, {"step": 8}, {"rank": 0}):
        key = {"seed": 0, "step": 7, "rank": 1, **other}
        assert (data.drop_path_factors(model, **key, batch_size=4000)[1:] != factors[1:]).any(axis=(1, 2)).all()
    assert data.drop_path_factors(model_config(depth=1, drop_path=0.4), seed=0, step=0, rank=0, batch_size=9).min() == 1


def test_dropout_seeds():
    model = model_config(depth=5, dropout=0.1)
    key = {"seed": 0, "step": 7, "rank": 1}
    seeds = data.dropout_seeds(model, **key)
    assert seeds.shape == (6, 3)
    assert seeds.dtype == np.float32
    assert len(np.unique(seeds)) == 18
    assert 0 <= seeds.min() < seeds.max() < 1
    np.testing.assert_array_equal(seeds, data.dropout_seeds(model, **key))
    for other in ({"seed": 1}, {"step": 8}, {"rank": 0}):
        assert (data.dropout_seeds(model, **{**key, **other}) != seeds).all()


def test_keys_of_different_purpose_do_not_meet():
    assert len({data.ORDER, data.IMAGE, data.MIX, data.DROP_PATH, data.DROPOUT}) == 5
    keys = [(1, 5, 2), (2, 5, 2), (1, 5, 2, 1), (1, 2, 5), (1, 5, 3)]
    assert len({data.keyed_generator(*key).integers(2**62) for key in keys}) == len(keys)


# --------------------------------------------------------------------------------------------- training batches


def test_an_epoch_shows_each_image_at_most_once_with_its_label(coded):
    source = TrainBatches(coded, make_config(), batch_size=8)
    assert len(source) == source.steps_per_epoch == 3
    seen = []
    for index, (images, targets) in enumerate(all_items(source)):
        assert images.shape == (8, 3, 16, 16)
        assert (images.dtype, targets.dtype) == (np.uint8, np.float32)
        assert images[:, 1].min() == images[:, 1].max() == 100
        assert shown(images) == source.samples(index).tolist()
        np.testing.assert_array_equal(targets, np.eye(3)[coded.labels[shown(images)]])
        seen += shown(images)
    assert len(set(seen)) == 24
    assert source.unreadable().tolist() == []


def test_epochs_and_seeds_have_their_own_orders(coded):
    def order(seed, epoch):
        source = TrainBatches(coded, make_config(seed=seed), batch_size=8, epoch=epoch)
        return np.concatenate([source.samples(index) for index in range(3)]).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(item) for item in orders}) == 4
    assert order(0, 1) == orders[1]
    assert all(set(item) <= set(range(IMAGE_COUNT)) for item in orders)


def test_position_epoch_and_seed_each_change_the_augmentation(tmp_path, noisy):
    (tmp_path / "a").mkdir()
    for index in range(8):
        shutil.copy(noisy.path(0), tmp_path / "a" / f"{index}.jpg")
    copies = ImageFolder(tmp_path)  # all alike, so only the draws can make a difference
    images = [
        TrainBatches(copies, make_config(ALONE, seed=seed), batch_size=8, epoch=epoch)[0][0]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({image.tobytes() for batch in images for image in batch}) == 24


@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_share_what_one_rank_would_see(noisy, repeats):
    config = make_config(dataclasses.replace(ALONE, repeats=repeats))
    alone = all_items(TrainBatches(noisy, config, batch_size=8))
    for ranks in (2, 4):
        sources = [TrainBatches(noisy, config, batch_size=8 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step, (images, targets) in enumerate(alone):
            parts = [source[step] for source in sources]
            np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), images)
            np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), targets)
            if repeats == 1:
                samples = [set(source.samples(step).tolist()) for source in sources]
                assert len(set.union(*samples)) == 8


def test_ranks_mix_differently(tmp_path):
    for index in range(8):
        save_noise(tmp_path / f"class{index}" / "x.png", (16, 16), index)
    config = make_config(dataclasses.replace(PLAIN, mixup=1.0))
    folder = ImageFolder(tmp_path)
    targets = [TrainBatches(folder, config, batch_size=4, rank=rank, ranks=2)[0][1] for rank in (0, 1)]
    shares = [np.unique(np.round(part[part > 0], 4)).tolist() for part in targets]  # λ and 1 - λ
    assert len(shares[0]) == len(shares[1]) == 2
    assert shares[0] != shares[1]


def test_repeated_augmentation_shows_an_image_several_times_differently(coded, noisy):
    source = TrainBatches(coded, make_config(dataclasses.replace(PLAIN, repeats=3)), batch_size=8)
    for index in range(3):
        assert shown(source[index][0]) == source.samples(index).tolist()
    source = TrainBatches(noisy, make_config(dataclasses.replace(ALONE, repeats=3)), batch_size=8)
    assert len(source) == 3
    positions = np.concatenate([source.samples(index) for index in range(3)])
    once = TrainBatches(noisy, make_config(ALONE), batch_size=8)
    order = np.concatenate([once.samples(index) for index in range(3)])
    np.testing.assert_array_equal(positions, order.repeat(3)[:24])
    images = source[0][0]
    assert (images[0] != images[1]).any()


def test_a_restart_replays_nothing(noisy):
    config = make_config(EVERYTHING)
    columns = [("step", lambda step: np.array([step], np.float32))]
    unbroken = all_items(TrainBatches(noisy, config, batch_size=8, epochs=3, extra_columns=columns))
    assert [row[2].item() for row in unbroken] == list(range(9))
    for start in range(9):
        epoch, step = divmod(start, 3)
        rest = TrainBatches(
            noisy, config, batch_size=8, epoch=epoch, start=step, epochs=3 - epoch, extra_columns=columns
        )
        assert_equal_items(all_items(rest), unbroken[start:])
    assert len(TrainBatches(noisy, config, batch_size=8, epoch=1, start=3)) == 0
    with pytest.raises(IndexError):
        TrainBatches(noisy, config, batch_size=8)[3]


def test_the_order_of_asking_does_not_matter(noisy):
    source = TrainBatches(noisy, make_config(EVERYTHING), batch_size=8, epochs=2)
    forward = all_items(source)
    assert_equal_items(
        [source[index] for index in (5, 0, 3, 1, 4, 2)], [forward[index] for index in (5, 0, 3, 1, 4, 2)]
    )


def test_a_folder_smaller_than_a_batch_is_refused(coded):
    with pytest.raises(UserError, match=r"data\.batch_size: 28 images a step over all ranks are more than the 26"):
        TrainBatches(coded, make_config(), batch_size=14, ranks=2)


# -------------------------------------------------------------------------------------------------- MindSpore


def through_mindspore(source):
    dataset = data.to_dataset(source)
    assert dataset.get_dataset_size() == len(source)
    return list(dataset.create_tuple_iterator(output_numpy=True, num_epochs=1))


WORKERS = [(1, False), (2, False), (4, False), (1, True), (2, True), (64, True)]


@pytest.mark.parametrize(("num_workers", "processes"), WORKERS)
def test_workers_change_nothing(noisy, num_workers, processes):
    options = {"num_workers": num_workers, "worker_processes": processes}
    columns = [("step", lambda step: np.array([step, -step], np.float32))]

    def source(**workers):
        return TrainBatches(
            noisy, make_config(EVERYTHING, **workers), batch_size=4, epochs=2, start=2, extra_columns=columns
        )

    assert_equal_items(through_mindspore(source(**options)), all_items(source()))
    evaluation = [EvalBatches(noisy, make_config(**workers), batch_size=5) for workers in (options, {})]
    assert_equal_items(through_mindspore(evaluation[0]), all_items(evaluation[1]))


def test_columns_have_their_names(coded):
    source = TrainBatches(
        coded, make_config(), batch_size=8, extra_columns=[("learning_rate", lambda step: np.zeros(1))]
    )
    assert data.to_dataset(source).get_col_names() == ["images", "targets", "learning_rate"]
    assert data.to_dataset(EvalBatches(coded, make_config(), batch_size=8)).get_col_names() == [
        "images",
        "labels",
        "valid",
    ]


@pytest.mark.parametrize("processes", [False, True])
def test_a_worker_takes_rows_larger_than_the_shared_memory_it_gets_unasked(noisy, processes):
    config = make_config(ALONE, size=320, num_workers=2, worker_processes=processes)
    source = TrainBatches(noisy, config, batch_size=26)
    assert source[0][0].nbytes > 6 * 2**20
    assert_equal_items(through_mindspore(source), all_items(source))


@pytest.mark.parametrize("processes", [False, True])
def test_an_error_in_a_worker_comes_out(coded, processes):
    def fail(step):
        raise ValueError(f"the column fails at {step}")

    config = make_config(num_workers=2, worker_processes=processes)
    with pytest.raises(RuntimeError, match="the column fails at 0"):
        through_mindspore(TrainBatches(coded, config, batch_size=8, extra_columns=[("fails", fail)]))


# ------------------------------------------------------------------------------------------------- unreadable


@pytest.fixture
def damaged(tmp_path, coded):
    """The coded folder with images 3, 4 and 20 spoilt."""
    shutil.copytree(coded.root, tmp_path / "damaged")
    folder = ImageFolder(tmp_path / "damaged")
    folder.path(3).write_bytes(b"")
    folder.path(4).write_bytes(folder.path(4).read_bytes()[:40])
    folder.path(20).write_text("no image")
    return folder


def test_the_next_readable_image_takes_the_place(damaged):
    source = TrainBatches(damaged, make_config(), batch_size=8, epochs=4)
    found = set()
    for index in range(len(source)):
        images, targets = source[index]
        first = TrainBatches(damaged, make_config(), batch_size=26, epoch=index // 3).samples(0).tolist()
        expected, met = [], set()
        for position in range(index % 3 * 8, index % 3 * 8 + 8):
            while first[position % 26] in (3, 4, 20):
                met.add(first[position % 26])
                position += 1
            expected.append(first[position % 26])
        assert shown(images) == expected
        np.testing.assert_array_equal(targets.argmax(axis=1), damaged.labels[expected])
        found |= met
        assert source.unreadable().tolist() == sorted(found)
    assert found == {3, 4, 20}


@pytest.mark.parametrize(("num_workers", "processes"), [(2, False), (2, True)])
def test_what_is_unreadable_does_not_depend_on_workers(damaged, num_workers, processes):
    config = make_config(ALONE, num_workers=num_workers, worker_processes=processes)
    expected = all_items(TrainBatches(damaged, make_config(ALONE), batch_size=4, epochs=4))
    source = TrainBatches(damaged, config, batch_size=4, epochs=4)
    assert_equal_items(through_mindspore(source), expected)
    assert source.unreadable().tolist() == [3, 4, 20]


def test_a_known_bad_file_is_not_read_again(damaged, monkeypatch):
    attempts = []
    original = data.open_image

    def counted(path, *arguments):
        attempts.append(Path(path).name)
        return original(path, *arguments)

    monkeypatch.setattr(data, "open_image", counted)
    all_items(TrainBatches(damaged, make_config(), batch_size=8, epochs=5))
    assert [attempts.count(name) for name in ("03.png", "04.png", "20.png")] == [1, 1, 1]


def test_unreadable_images_are_counted_named_and_limited(damaged):
    count = UnreadableCount(damaged, max_share=0.1)
    assert count.update(np.array([], np.int64)) == []
    assert count.update(np.array([20])) == [str(damaged.path(20))]
    assert count.update(np.array([20])) == []
    assert count.update(np.array([3, 20])) == [str(damaged.path(3))]
    message = r"data.train: 3 of 26 images cannot be read \(11.54%; .* allows 10.00%\): .*03.png, .*04.png, .*20.png"
    with pytest.raises(UserError, match=message) as caught:
        count.update(np.array([3, 4, 20]))
    assert "03.png: cannot be read as an image (no image of a known format)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_mask_is_named_and_not_its_image(coded, tmp_path):
    for name in coded.names:
        mask = data.mask_path(tmp_path, name)
        mask.parent.mkdir(exist_ok=True)
        mask.write_bytes((coded.root / name).read_bytes())
    bad = data.mask_path(tmp_path, coded.names[5])
    bad.write_bytes(b"no image")
    config = make_config().replace(skip=(SkipConfig(0, 4, 0.5, score="mask"),))
    source = TrainBatches(coded, config, batch_size=len(coded), masks=tmp_path)
    source[0]
    assert UnreadableCount(coded, 0.1, tmp_path).update(source.unreadable()) == [str(bad)]
    with pytest.raises(UserError, match=f"{bad}; {bad}: cannot be read as an image"):
        UnreadableCount(coded, 0.0, tmp_path).update(source.unreadable())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_folder_of_nothing_readable_stops_the_run(damaged, batch_size):
    for index in range(len(damaged)):
        damaged.path(index).write_bytes(b"")
    source = TrainBatches(damaged, make_config(), batch_size=batch_size)
    assert source[0][0].max() == 0
    with pytest.raises(UserError, match="26 of 26 images cannot be read"):
        UnreadableCount(damaged, max_share=1.0).update(source.unreadable())


# ------------------------------------------------------------------------------------------- evaluation batches


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 26, 40])
def test_evaluation_counts_each_image_once_over_all_ranks(coded, ranks, batch_size):
    sources = [
        EvalBatches(coded, make_config(), batch_size=batch_size, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    assert len({len(source) for source in sources}) == 1
    seen = []
    for source in sources:
        for index, (images, labels, valid) in enumerate(all_items(source)):
            assert images.shape == (batch_size, 3, 16, 16)
            assert (labels.dtype, valid.dtype) == (np.int32, np.int32)
            counted = valid == 1
            assert shown(images[counted]) == source.samples(index)[counted].tolist()
            np.testing.assert_array_equal(labels[counted], coded.labels[shown(images[counted])])
            assert (source.samples(index)[~counted] == -1).all()
            assert labels[~counted].sum() == valid[~counted].sum() == images[~counted].sum() == 0
            assert source.check(index, labels) == []
            seen += shown(images[counted])
    assert sorted(seen) == list(range(IMAGE_COUNT))
    assert len(sources[0]) == -(-IMAGE_COUNT // (batch_size * ranks))


def test_evaluation_refuses_or_skips_what_it_cannot_read(damaged):
    for skip in (False, True):
        source = EvalBatches(damaged, make_config(num_workers=2), batch_size=8, skip_unreadable=skip)
        items = through_mindspore(source)
        assert [row[2].sum() for row in items] == [6, 8, 7, 2]
        assert items[0][1].tolist()[2:6] == [0, -1, -1, 0]
        assert source.check(1, items[1][1]) == []
        if skip:
            assert source.check(0, items[0][1]) == [3, 4]
        else:
            with pytest.raises(UserError, match=r"03.png: cannot be read as an image .* --skip-unreadable"):
                source.check(0, items[0][1])


# ------------------------------------------------------------------------------------------------------ masks


def test_object_patches_are_shares_in_evaluations_geometry(tmp_path):
    mask = np.zeros((20, 40), np.uint8)  # wider than high: the centre 20 × 20 is left, then 16 × 16 of that
    mask[2:10, 12:16] = 255  # the left half of the crop's first patch
    mask[10:18, 20:30] = 255  # all of its last patch, and two columns that are cropped off
    Image.fromarray(mask).save(tmp_path / "mask.png")
    size = (40, 20)
    shares = data.object_patches(tmp_path / "mask.png", size, make_config(size=16, val_crop_ratio=0.8))
    assert shares.dtype == np.float32
    assert shares.tolist() == [0.5, 0.0, 0.0, 1.0]
    doubled = Image.fromarray(mask.repeat(2, 0).repeat(2, 1))
    doubled.save(tmp_path / "doubled.png")
    again = data.object_patches(tmp_path / "doubled.png", size, make_config(size=16, val_crop_ratio=0.8))
    assert again.tolist() == shares.tolist()
    with pytest.raises(UserError, match=r"data\.masks: .*missing.png: cannot be read"):
        data.object_patches(tmp_path / "missing.png", size, make_config())
    assert data.mask_path(Path("masks/val"), "a/x.y.jpg") == Path("masks/val/a/x.y.png")


# ----------------------------------------------------------------------------------------------------- scores

RANDOM, MASK = SkipConfig(0, 4, 0.5, score="random"), SkipConfig(5, 8, 0.5, score="mask")


def scores_of(spans, folder, **options):
    """Batches of a configuration with these spans; the scores come last."""
    config = make_config(options.pop("augment", PLAIN), options.pop("size", 32), options.pop("seed", 0))
    return TrainBatches(folder, config.replace(skip=spans), batch_size=4, **options)


def test_random_scores_are_uniform():
    """Each patch as often among the kept as any other, each pair too: 3 of 16 in 20,000 images."""
    scores = data.random_scores(16, 20_000, 1, 2, 3)
    assert (scores.dtype, scores.shape) == (np.float32, (20_000, 16))
    np.testing.assert_array_equal(np.sort(scores, axis=1)[0], np.arange(16, dtype=np.float32) / 16)
    kept = scores >= 13 / 16
    assert (kept.sum(axis=1) == 3).all()
    standard_error = np.sqrt(3 / 16 * 13 / 16 / 20_000)
    np.testing.assert_allclose(kept.mean(axis=0), 3 / 16, atol=5 * standard_error)
    pairs = (kept.T.astype(float) @ kept)[np.triu_indices(16, 1)] / 20_000
    np.testing.assert_allclose(pairs, 3 / 16 * 2 / 15, atol=5 * np.sqrt(0.025 * 0.975 / 20_000))


def test_random_scores_differ_by_step_rank_span_and_seed_and_not_between_two_runs(coded):
    two = (RANDOM, SkipConfig(5, 8, 0.5, score="random"))
    source, again = scores_of(two, coded), scores_of(two, coded)
    assert source.columns == ["images", "targets", "scores"]
    first, second = (source[index][-1] for index in (0, 1))
    assert (first.dtype, first.shape) == (np.float32, (2, 4, 16))
    others = [second, scores_of(two, coded, ranks=2, rank=1)[0][-1], scores_of(two, coded, seed=1)[0][-1]]
    for other in (*others, first[::-1], first[:, ::-1]):
        assert (other != first).any(axis=-1).all()
    np.testing.assert_array_equal(again[0][-1], first)
    # A run that goes on from a step draws what the unbroken one draws there.
    np.testing.assert_array_equal(scores_of(two, coded, start=1)[0][-1], second)


def test_scores_come_only_where_a_span_is_given_them(coded):
    for spans in ((), (SkipConfig(),), (dataclasses.replace(RANDOM, keep_ratio=1.0),)):
        assert scores_of(spans, coded).columns == ["images", "targets"]
    with pytest.raises(ValueError, match="no masks were given"):
        scores_of((MASK,), coded)[0]


@pytest.fixture(scope="module")
def red_masks(noisy, tmp_path_factory):
    """Of each image a mask that is its red channel: wherever an image is moved to, its mask can be read off it."""
    root = tmp_path_factory.mktemp("masks")
    for name in noisy.names:
        path = data.mask_path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(Image.open(noisy.root / name))[:, :, 0]).save(path)
    return root


@pytest.mark.parametrize("crop", ["random_resized", "shift", "none"])
def test_masks_follow_their_images(noisy, red_masks, crop, monkeypatch):
    """Through crop, flip, RandAugment's moves, mixup and cutmix."""
    moving = tuple(row for row in data.RAND_AUGMENT if row[0] in data.MOVING)
    assert len(moving) == len(data.MOVING) == 5
    monkeypatch.setattr(data, "RAND_AUGMENT", moving)
    augment = dataclasses.replace(EVERYTHING, crop=crop, erase=0.0)
    config = make_config(augment, 32, mean=(0.0, 0.0, 0.0)).replace(skip=(RANDOM, MASK))
    source = TrainBatches(noisy, config, batch_size=4, masks=red_masks)
    plain = TrainBatches(noisy, config.replace(skip=()), batch_size=4)
    for index in range(6):
        images, targets, scores = source[index]
        assert images.shape == (4, 3, 32, 32)
        means = images[:, 0].reshape(4, 4, 8, 4, 8).mean(axis=(2, 4)).reshape(4, 16) / 255
        np.testing.assert_allclose(scores[1], means, atol=1e-6)
        np.testing.assert_array_equal(scores[0], scores_of((RANDOM,), noisy)[index][-1][0])
        for ours, theirs in zip((images, targets), plain[index]):
            np.testing.assert_array_equal(ours, theirs)  # a mask changes nothing else


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (96, 48), (30, 90)])
@pytest.mark.parametrize("colour", ["L", "RGB", "P"])
def test_a_mask_of_another_size_or_colour_is_laid_over_its_image(tmp_path, shape, colour):
    """As bright as it is in grey, in training as in evaluation: the left half of a square image is object."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    save_noise(images / "a" / "0.png", (32, 32), 0)
    mask = np.zeros(shape, np.uint8)
    mask[:, : shape[1] // 2] = 1
    drawn = Image.fromarray(mask, "P")
    drawn.putpalette([0, 0, 0, 0, 255, 0])  # green, as bright as grey of 150
    (masks / "a").mkdir(parents=True)
    drawn.convert("RGB").convert(colour).save(masks / "a" / "0.png")
    folder = ImageFolder(images, "data.train")
    config = make_config(PLAIN, 32, val_crop_ratio=1.0).replace(skip=(MASK,))
    trained = TrainBatches(folder, config, batch_size=1, masks=masks)[0][-1][0, 0].reshape(4, 4)
    evaluated = EvalBatches(folder, config, batch_size=1, masks=masks)[0][-1][0, 0].reshape(4, 4)
    for scores in (trained, evaluated):
        np.testing.assert_allclose(scores[:, 0], 150 / 255, atol=0.01)
        np.testing.assert_allclose(scores[:, 3], 0, atol=0.01)
        np.testing.assert_allclose(scores[:, 1:3], [[150 / 255, 0]] * 4, atol=0.1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_the_size_of_an_image_is_that_of_its_pixels(tmp_path, orientation, kind):
    path = tmp_path / f"a.{kind.lower()}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 6)).save(path, kind, exif=exif)
    assert data.image_size(path) == data.open_image(path).size == ((6, 8) if orientation > 4 else (8, 6))
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UnreadableImage, match="cannot be read as an image"):
        data.image_size(path)


def test_an_image_whose_mask_cannot_be_read_is_replaced(noisy, red_masks, tmp_path):
    masks = shutil.copytree(red_masks, tmp_path / "masks")
    source = scores_of((MASK,), noisy, masks=masks)
    sample = source.samples(0)[1]
    data.mask_path(masks, noisy.names[sample]).write_bytes(b"no image")
    source[0]
    assert source.unreadable().tolist() == [sample]


def test_evaluation_draws_scores_by_the_image_alone(noisy, red_masks):
    """However many are shown at once, and to whom."""
    config = make_config(size=32).replace(skip=(RANDOM, MASK))
    batches = all_items(EvalBatches(noisy, config, batch_size=5, masks=red_masks))
    together = np.concatenate([scores for *_, scores in batches], axis=1)[:, :IMAGE_COUNT]
    shared = [all_items(EvalBatches(noisy, config, batch_size=4, rank=r, ranks=2, masks=red_masks)) for r in (0, 1)]
    parted = np.concatenate([scores for pair in zip(*shared) for *_, scores in pair], axis=1)[:, :IMAGE_COUNT]
    np.testing.assert_array_equal(together, parted)
    assert (together[0, 1:] != together[0, :-1]).any(axis=1).all(), "images share a choice"
    images = np.concatenate([images for images, *_ in batches])[:IMAGE_COUNT]
    means = data.patch_means(images[:, 0], 8)
    assert np.abs(together[1] - means).max() < 0.2  # the images' geometry, the masks' resampling
    assert np.corrcoef(together[1].ravel(), means.ravel())[0, 1] > 0.8


def test_masks_are_asked_for_where_a_span_scores_by_them(coded, tmp_path):
    root = str(coded.root)
    given = make_config(train=root, val=root).replace(skip=(MASK,))
    with pytest.raises(UserError, match=r"data\.masks: not given; skip\.score=mask needs"):
        data.resolve_folders(given)
    for name in coded.names:
        save_noise(tmp_path / name, (4, 4), 0)
    masks = {"train": root, "val": root, "masks": str(tmp_path)}
    with pytest.raises(UserError, match=r"data\.train_masks: not given"):
        data.resolve_folders(make_config(**masks).replace(skip=(MASK,)))
    both = make_config(**masks, train_masks=str(tmp_path)).replace(skip=(MASK,))
    assert data.resolve_folders(both).train_masks == tmp_path
    (tmp_path / coded.names[3]).unlink()
    with pytest.raises(UserError, match=f"data.masks: .* has no mask of {coded.names[3]}"):
        data.resolve_folders(both)
