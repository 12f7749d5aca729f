"""Image folders in, batches out; every random choice is a function of what is being drawn, never of who draws it.

Seeds alone do not make an input pipeline repeat: stages and workers share the global generators, so their number
changes the result. Here each choice has a key of its own and a generator made from it: an epoch's order from
(seed, epoch), an image's augmentation from (seed, epoch, position), a batch's mixing from (seed, step, rank), a
block's drop path and a span's random scores from (seed, step, rank, block). So the batches are the same for any number
of workers, threads or processes, and a resumed run starts at its step with nothing replayed.

A sample's way: `ImageFolder` lists it, `read_image` reads it, `augment_image` (training) or `resize_and_crop`
(evaluation) makes it (3, S, S) of uint8, `TrainBatches` or `EvalBatches` puts a rank's whole batch together,
`to_dataset` hands that to MindSpore. Normalisation is the model's first operation: bytes are what is worth moving.
"""

import contextlib
import functools
import hashlib
import inspect
import math
import mmap
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, Union

import mindspore.dataset
import numpy as np
from mindcv.data.auto_augment import NAME_TO_OP
from mindcv.data.mixup import mixup_target
from mindspore.dataset import vision
from mindspore.dataset.vision import Inter
from PIL import Image, UnidentifiedImageError

from skipvit import clutter
from skipvit.config import AugmentConfig, Config, ModelConfig, UserError, given_spans

try:
    import simplejpeg  # optional: the same bytes as Pillow's, sooner
except ImportError:
    simplejpeg = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")  # nothing that Pillow would run a program for
MAX_PIXELS = 89_478_485  # of an image; from here on Pillow warns of a decompression bomb, we refuse
MAX_IMAGE_BYTES = 1 << 29  # of a file; 16-bit RGB of so many pixels, not compressed
MAX_ASPECT = 32  # of an image; beyond, its ends are cut off before it is resized
NAMES_SHOWN = 5  # of many files or classes in a message
PREFETCH_BATCHES = 4  # finished batches that wait in MindSpore's queue (128 images of 224×224 are 19 MB)

# First word of every key, so that no two purposes share a stream.
ORDER, IMAGE, MIX, DROP_PATH, DROPOUT, SCORE, EVALUATION_SCORE = 1, 2, 3, 4, 5, 6, 7

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright (EXIF 2.3, 4.6.4 A)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # those of them that swap width and height
RESAMPLING = {"bilinear": Inter.BILINEAR, "bicubic": Inter.BICUBIC}  # data.interpolation -> MindSpore's name
PILLOW_RESAMPLING = {
    Inter.BILINEAR: Image.Resampling.BILINEAR,
    Inter.BICUBIC: Image.Resampling.BICUBIC,
    Inter.NEAREST: Image.Resampling.NEAREST,
}

# What Pillow finds odd in a file is either said by us or of no interest, and not in the middle of the progress.
warnings.filterwarnings("ignore", module=r"PIL\..*")

ExtraColumn = tuple[str, Callable[[int], np.ndarray]]  # a name, and its value as a function of the global step


def keyed_generator(*key: int) -> np.random.Generator:
    """The generator of a key of non-negative integers: equal keys, equal draws, on every machine and worker."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


# ---------------------------------------------------------------------------------------------------- folders


class ImageFolder:
    """The images of a folder ``<class>/…/<image>``, in an order that depends on their names alone.

    Only what has one of `IMAGE_SUFFIXES` counts; what is hidden does not. Links are followed, save into a folder that
    the link itself lies in. A link to nothing, a pipe or a device counts as an image, which then cannot be read:
    better named than passed over.

    Attributes:
        root: the folder.
        classes: names of the class folders, sorted; an image's label is the index of its class.
        names: each image's path below ``root``, with ``/``, sorted within its class.
        labels: (images,) int32.

    Raises:
        UserError: the folder is missing, holds no class folders, or a class folder holds no image.
    """

    def __init__(self, root: Union[str, Path], where: str = "data.train") -> None:
        """List ``root``; ``where`` is the key or option that it was given as, for the messages."""
        self.root = Path(root)
        if not self.root.is_dir():
            kind = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{where}: {self.root} {kind}; give a folder with one folder of images a class")
        try:
            self.classes = tuple(sorted(entry.name for entry in _visible(self.root) if _is_folder(entry)))
            if not self.classes:
                raise UserError(f"{where}: {self.root} holds no class folders; put images into <class>/<image>")
            if {"train", "val"} <= set(self.classes):
                raise UserError(f"{where}: {self.root} holds train/ and val/; give {self.root / 'train'} or val")
            of_class = [sorted(_images_below(self.root / name, name)) for name in self.classes]
        except OSError as error:
            raise UserError(f"{where}: {error.filename} cannot be listed ({error.strerror})") from None
        empty = [name for name, images in zip(self.classes, of_class) if not images]
        if empty:
            raise UserError(
                f"{where}: {self.root} has class folders without images: {first_names(empty)}; "
                f"images end in {' '.join(IMAGE_SUFFIXES)}"
            )
        self.names = [name for images in of_class for name in images]
        self.labels = np.repeat(np.arange(len(self.classes)), [len(images) for images in of_class]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where the image lies."""
        return self.root / self.names[index]

    def fingerprint(self) -> str:
        """Number of images and SHA-256 of their names: equal wherever the same folder lies."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        return f"{len(self)} images, sha256 {digest.hexdigest()}"


def images_in(folder: Union[str, Path]) -> list[Path]:
    """The images of a folder and its folders, sorted; what counts as one, and links, as in `ImageFolder`.

    Raises:
        UserError: it cannot be listed, or holds none.
    """
    try:
        images = sorted(Path(folder, name) for name in _images_below(Path(folder), "."))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from None
    if not images:
        raise UserError(f"{folder}: holds no images; they end in {' '.join(IMAGE_SUFFIXES)}")
    return images


def _visible(folder: Union[str, Path]) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _images_below(folder: Path, name: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Names of the images in ``folder`` and its folders; ``above`` identifies the folders it lies in."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link that leads back up
        return
    for entry in _visible(folder):
        if _is_folder(entry):
            yield from _images_below(Path(entry.path), f"{name}/{entry.name}", (*above, identity))
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield f"{name}/{entry.name}"


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Refuse two folders whose classes differ, since labels are positions in the list of classes.

    Raises:
        UserError: naming the classes that only one of them has.
    """
    parts = [
        f"only {folder.root} has {first_names(only)}"
        for folder, only in (
            (train, sorted(set(train.classes) - set(val.classes))),
            (val, sorted(set(val.classes) - set(train.classes))),
        )
        if only
    ]
    if parts:
        raise UserError(f"data.val: its classes are not those of data.train: {'; '.join(parts)}")


class Folders(NamedTuple):
    """What a run reads. ``masks`` is parallel to ``val``, ``train_masks`` to ``train``; None where there are none."""

    train: ImageFolder
    val: ImageFolder
    masks: Optional[Path]
    train_masks: Optional[Path] = None


def resolve_folders(config: Config) -> Folders:
    """The folders that the section ``data`` means; ``clutter`` is generated if need be.

    Raises:
        UserError: one is missing or wrong, the classes differ, there are more than ``model.num_classes``, or a span
            scores by masks and there are none.
    """
    data = config.data
    train_root, val_root, masks, train_masks = data.train, data.val, data.masks, data.train_masks
    by_mask = any(span.score == "mask" for span in config.skip)
    if train_root == "clutter":
        generated = clutter.ensure()
        train_root = str(generated / "train")
        if by_mask:
            train_masks = train_masks or str(generated / "masks" / "train")
        if val_root is None:
            val_root = str(generated / "val")
            masks = masks or str(generated / "masks" / "val")
    if val_root is None:
        raise UserError("data.val: not given; give the folder of the images to validate on, as data.val=FOLDER")
    for key, folder in (("masks", masks), ("train_masks", train_masks)):
        if folder is not None and not Path(folder).is_dir():
            hint = "give the masks' folder" if by_mask else "leave it out where there are no masks"
            raise UserError(f"data.{key}: {folder} is not a folder; {hint}")
    train, val = ImageFolder(train_root, "data.train"), ImageFolder(val_root, "data.val")
    check_same_classes(train, val)
    num_classes = config.model.num_classes
    if num_classes is not None and num_classes < len(train.classes):
        raise UserError(
            f"model.num_classes: {num_classes} is fewer than the {len(train.classes)} classes of {train.root}; "
            "leave it out to have as many"
        )
    folders = Folders(train, val, *(None if folder is None else Path(folder) for folder in (masks, train_masks)))
    if by_mask or masks is not None:
        check_masks(folders.masks, val, "data.masks")
    if by_mask:
        check_masks(folders.train_masks, train, "data.train_masks")
    return folders


# ---------------------------------------------------------------------------------------------------- reading


class UnreadableImage(ValueError):  # noqa: N818 (what it is, not what went wrong)
    """A file that cannot be read as an image; ``path`` and ``reason`` say which and why."""

    def __init__(self, path: Union[str, Path], reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: cannot be read as an image ({self.reason})"


def read_image(path: Union[str, Path], least_side: Optional[int] = None) -> np.ndarray:
    """The image as uint8 (H, W, 3) RGB; see `open_image`."""
    pixels = None if simplejpeg is None else _plain_jpeg(path, least_side)
    return np.asarray(open_image(path, least_side)) if pixels is None else pixels


def _plain_jpeg(path: Union[str, Path], least_side: Optional[int]) -> Optional[np.ndarray]:
    """What Pillow would decode, byte for byte, by simplejpeg; None for all but sound, ordinary colour JPEGs.

    Both have libjpeg-turbo at work, but Pillow then copies pixels in and out of memory of its own.
    """
    try:
        with _open_file(path) as file:
            start = file.read(3)
            if start != b"\xff\xd8\xff":
                return None
            content = start + file.read()
        if b"Exif\0\0" in content or b"tiff:Orientation" in content:  # it may have to be turned
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        reduced = least_side is not None and min(height, width) >= 2 * least_side
        if colours != "YCbCr" or height * width > MAX_PIXELS or reduced:
            return None
        return simplejpeg.decode_jpeg(content)
    except (OSError, ValueError):  # for Pillow to say what is wrong, or to make light of it
        return None


def open_image(path: Union[str, Path], least_side: Optional[int] = None) -> Image.Image:
    """Read an image file as 8-bit RGB, as a viewer would show it.

    EXIF rotation is applied; transparency is laid on white; 16-bit grey is scaled to 8 bits, not clipped; of an
    animation the first frame is taken; CMYK is converted without its colour profile, and other profiles are
    ignored too (torchvision and timm do likewise). Content decides the format, not the suffix.

    Args:
        path: the file.
        least_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps this
            many pixels; None: in full.

    Raises:
        UnreadableImage: missing, no image, truncated, corrupt, no ordinary file, of more than `MAX_PIXELS` pixels or
            `MAX_IMAGE_BYTES`, or of a kind whose values have no known scale (floating point). Damage that the format
            does not reveal is not noticed: a JPEG's scan carries no checksum.
    """
    with _opened(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(path, f"{image.width} by {image.height} pixels are more than {MAX_PIXELS}")
        if least_side is not None:
            image.draft(image.mode, (least_side, least_side))
        image.load()
        upright = UPRIGHT.get(_exif_orientation(image))
        rgb = _to_rgb(image)
        return rgb.transpose(upright) if upright is not None else rgb


@contextlib.contextmanager
def _opened(path: Union[str, Path]) -> Iterator[Image.Image]:
    """An image whose pixels are still to be read; whatever fails meanwhile is an `UnreadableImage`."""
    try:
        with _open_file(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            yield image
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(path, "no image of a known format") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(path, reason) from error


def image_size(path: Union[str, Path]) -> tuple[int, int]:
    """Width and height of what `open_image` reads, mostly without decoding the pixels.

    Raises:
        UnreadableImage: the file has no sound head.
    """
    with _opened(path) as image:
        if image.format == "TIFF":  # turned by Pillow as it loads
            image.load()
        width, height = image.size
        return (height, width) if _exif_orientation(image) in SIDEWAYS else (width, height)


def read_mask(path: Union[str, Path], size: tuple[int, int]) -> Image.Image:
    """A mask laid over its image of ``size`` (width, height): 8-bit grey; see `open_image`."""
    mask = open_image(path).convert("L")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def _open_file(path: Union[str, Path]) -> BinaryIO:
    """Open an ordinary file; a pipe is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status, reason = os.fstat(descriptor), None
    if stat.S_ISDIR(status.st_mode):
        reason = "Is a directory"
    elif not stat.S_ISREG(status.st_mode):
        reason = "a pipe, socket or device, not a file"
    elif status.st_size > MAX_IMAGE_BYTES:
        reason = f"{status.st_size} bytes are more than {MAX_IMAGE_BYTES}"
    if reason is None:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UnreadableImage(path, reason)


def _exif_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # turned by Pillow as it loads, which some releases forget to note
        return 1
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to refuse sound pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip at 255, which leaves 16-bit images white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values have no known scale")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point values have no known scale")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def unreadable_file(folder: ImageFolder, sample: int, masks: Optional[Path]) -> Path:
    """Which file of a sample that counts as unreadable is: the image, or its mask where the image can be read."""
    image = folder.path(sample)
    if masks is None or _reason(image):
        return image
    mask = mask_path(masks, folder.names[sample])
    return mask if _reason(mask) else image


def why_unreadable(path: Path) -> str:
    """The reason, the file read again: workers hand back only which samples they could not read."""
    return _reason(path) or f"{path}: could not be read at first, though it can be now"


def _reason(path: Path) -> Optional[str]:
    try:
        open_image(path)
    except UnreadableImage as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------- one image


def shorter_side(size: int, crop_ratio: float) -> int:
    """What evaluation resizes an image's shorter side to, in pixels, for a crop of ``size``; rounded as timm does."""
    return max(size, math.floor(size / crop_ratio))


def resize_and_crop(image: Image.Image, size: int, crop_ratio: float, resample: Inter) -> Image.Image:
    """Evaluation's geometry: the shorter side to ``size / crop_ratio``, then the central ``size``×``size``.

    Rounding is that of timm and of torchvision's Resize and CenterCrop: published weights meet the pixels they expect.
    """
    shorter = shorter_side(size, crop_ratio)
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):  # 20,000 × 1 would become 5,000,000 × 256
        beyond = max(0, width - MAX_ASPECT * height) // 2, max(0, height - MAX_ASPECT * width) // 2
        image = image.crop((beyond[0], beyond[1], width - beyond[0], height - beyond[1]))
        width, height = image.size
    if width <= height:
        wanted = (shorter, max(shorter, int(shorter * height / width)))
    else:
        wanted = (max(shorter, int(shorter * width / height)), shorter)
    if wanted != image.size:
        image = image.resize(wanted, PILLOW_RESAMPLING[resample])
    left, top = round((wanted[0] - size) / 2), round((wanted[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def evaluation_image(image: Image.Image, config: Config) -> np.ndarray:
    """An RGB image as evaluation shows it to the model: uint8 (3, S, S)."""
    data = config.data
    resample = RESAMPLING[data.interpolation]
    cropped = resize_and_crop(image, config.model.image_size, data.val_crop_ratio, resample)
    return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))


def augment_image(
    image: np.ndarray, config: Config, generator: np.random.Generator, mask: Optional[np.ndarray] = None
) -> np.ndarray:
    """An image (H, W, 3) as training shows it to the model: cropped, flipped, RandAugmented, erased; uint8 (3, S, S).

    The order is timm's: crop, flip, RandAugment, erasing. A ``mask`` (H, W, 3), grey, follows the image wherever it is
    moved to, and is the fourth channel of the result then: (4, S, S).
    """
    augment, size = config.augment, config.model.image_size
    resample = RESAMPLING[config.data.interpolation]
    height, width = image.shape[:2]
    arrays = [image] if mask is None else [image, mask]
    if augment.crop == "random_resized":
        left, top, right, bottom = random_resized_box((width, height), augment, generator)
        arrays = [resize(array[top:bottom, left:right], size, resample) for array in arrays]
    else:
        arrays = [np.asarray(resize_and_crop(Image.fromarray(array), size, 1.0, resample)) for array in arrays]
    if augment.crop == "shift":
        left, top = generator.integers(0, 2 * augment.shift_pixels, size=2, endpoint=True).tolist()
        border = (augment.shift_pixels, augment.shift_pixels)
        padded = [np.pad(array, (border, border, (0, 0))) for array in arrays]
        arrays = [np.ascontiguousarray(array[top : top + size, left : left + size]) for array in padded]
    if generator.random() < augment.horizontal_flip:
        # Pixels as single items of three bytes are copied several times as fast.
        arrays = [np.ascontiguousarray(array.view("V3")[:, ::-1]).view(np.uint8) for array in arrays]
    if augment.rand_augment_magnitude > 0:
        arrays = rand_augment(arrays, config, generator)
    pixels = np.array(arrays[0].transpose(2, 0, 1), order="C")
    if generator.random() < augment.erase:
        erase(pixels, config, generator)
    return pixels if mask is None else np.concatenate([pixels, arrays[1][None, :, :, 0]])


def resize(image: np.ndarray, size: int, resample: Inter) -> np.ndarray:
    """An image (H, W, 3) of bytes at ``size`` × ``size``, as Pillow resizes it."""
    image = np.ascontiguousarray(image)
    if resample == Inter.BICUBIC:  # MindSpore's is a copy of Pillow's, and saves a copy to Pillow and one back
        return _bicubic(size)(image)
    return np.asarray(Image.fromarray(image).resize((size, size), PILLOW_RESAMPLING[resample]))


@functools.cache
def _bicubic(size: int) -> Callable[[np.ndarray], np.ndarray]:
    return vision.Resize((size, size), Inter.PILCUBIC)


def random_resized_box(
    size: tuple[int, int], augment: AugmentConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of random area and aspect within a (width, height).

    As torchvision's RandomResizedCrop: ten tries at an area in ``crop_scale`` of the image's and a logarithmically
    uniform aspect in ``crop_ratio``, else the largest central box whose aspect is within bounds.
    """
    width, height = size
    low_ratio, high_ratio = augment.crop_ratio
    for _ in range(10):
        area = width * height * generator.uniform(*augment.crop_scale)
        ratio = math.exp(generator.uniform(math.log(low_ratio), math.log(high_ratio)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(generator.integers(0, width - box_width, endpoint=True))
            top = int(generator.integers(0, height - box_height, endpoint=True))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * high_ratio)))
    box_height = min(height, max(1, round(width / low_ratio)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def least_training_side(config: Config) -> int:
    """How far a JPEG's decoding may be reduced (see `open_image`): no crop is enlarged that would not be anyway."""
    augment, size = config.augment, config.model.image_size
    if augment.crop != "random_resized":
        return 2 * size
    narrowest = min(augment.crop_ratio[0], 1 / augment.crop_ratio[1])
    return math.ceil(size / math.sqrt(augment.crop_scale[0] * narrowest))


def erase(pixels: np.ndarray, config: Config, generator: np.random.Generator) -> None:
    """Overwrite a random rectangle of uint8 (3, S, S) with noise, in place.

    timm's RandomErasing in mode ``pixel``, one rectangle: 2% to a third of the area, aspect 0.3 to 1/0.3, ten
    tries. Its noise is normal in normalised space; as bytes that is mean + std × normal, clipped to 0..255.
    """
    _, height, width = pixels.shape
    for _ in range(10):
        area = height * width * generator.uniform(0.02, 1 / 3)
        ratio = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_height < height and 0 < box_width < width:
            top = generator.integers(0, height - box_height, endpoint=True)
            left = generator.integers(0, width - box_width, endpoint=True)
            mean, std = (np.array(values)[:, None, None] for values in (config.data.mean, config.data.std))
            noise = generator.standard_normal((3, box_height, box_width))
            noise *= std
            noise += mean
            noise *= 255
            np.rint(noise, out=noise)
            pixels[:, top : top + box_height, left : left + box_width] = noise.clip(0, 255, out=noise)
            return


# RandAugment is timm's `rand-m9-mstd0.5-inc1` (DeiT's). The operations are mindcv's, where they are right on both
# releases: given fixed arguments those repeat exactly and agree with Pillow's. Some are not taken over: posterize
# keeps 8 - n bits where n are to be kept, so it does least where it should do most; the shears take a slope for
# degrees, 0.3° where 17° are meant; rotation fills its corners with red and blue exchanged. And timm's SolarizeAdd
# is missing. Those five are here, and solarizing, which takes a sixth of the time as arithmetic on bytes. What moves
# pixels is OpenCV's in MindSpore, in half the time of Pillow's: its bicubic (a = -0.75 where Pillow has -1) is a
# little less sharp.


def _posterize(image: np.ndarray, bits: int, **_: Any) -> np.ndarray:
    return image & np.uint8(256 - (1 << (8 - bits)))


def _solarize(image: np.ndarray, threshold: int, **_: Any) -> np.ndarray:
    return image ^ -(image >= threshold).view(np.uint8)  # -1 is 255: all bits change


def _solarize_add(image: np.ndarray, addend: int, **_: Any) -> np.ndarray:
    return image + (image < 128).view(np.uint8) * np.uint8(addend)  # at most 127 + 110


def _rotate(image: np.ndarray, degrees: float, fill_value: tuple[int, ...], resample: Inter) -> np.ndarray:
    return vision.Rotate(degrees, resample, fill_value=fill_value[::-1])(image)  # it fills with blue, green, red


def _shear_x(image: np.ndarray, slope: float, **options: Any) -> np.ndarray:
    height, width = image.shape[:2]  # MindSpore shears about the centre, timm about the corner
    return _affine(image, (-slope * height / (2 * width), 0.0), (slope, 0.0), **options)


def _shear_y(image: np.ndarray, slope: float, **options: Any) -> np.ndarray:
    height, width = image.shape[:2]
    return _affine(image, (0.0, -slope * width / (2 * height)), (0.0, slope), **options)


def _affine(
    image: np.ndarray,
    shift: tuple[float, float],
    slopes: tuple[float, float],
    fill_value: tuple[int, ...],
    resample: Inter,
) -> np.ndarray:
    """Shifted by shares of width and height, sheared by slopes along x and y."""
    degrees = [math.degrees(math.atan(slope)) for slope in slopes]
    return vision.Affine(0.0, shift, 1.0, degrees, resample, fill_value)(image)


def _enhancement(severity: float, sign: int) -> tuple[float, ...]:
    return (max(0.1, 1.0 + sign * 0.9 * severity),)


# Name, operation, and its arguments from the severity (magnitude / 10) and a random sign.
RAND_AUGMENT: tuple[tuple[str, Callable[..., np.ndarray], Callable[[float, int], tuple[float, ...]]], ...] = (
    ("AutoContrast", NAME_TO_OP["AutoContrast"], lambda severity, sign: ()),
    ("Equalize", NAME_TO_OP["Equalize"], lambda severity, sign: ()),
    ("Invert", NAME_TO_OP["Invert"], lambda severity, sign: ()),
    ("Rotate", _rotate, lambda severity, sign: (sign * 30.0 * severity,)),
    ("Posterize", _posterize, lambda severity, sign: (4 - int(4 * severity),)),
    ("Solarize", _solarize, lambda severity, sign: (255 - int(255 * severity),)),
    ("SolarizeAdd", _solarize_add, lambda severity, sign: (int(110 * severity),)),
    ("Color", NAME_TO_OP["Color"], _enhancement),
    ("Contrast", NAME_TO_OP["Contrast"], _enhancement),
    ("Brightness", NAME_TO_OP["Brightness"], _enhancement),
    ("Sharpness", NAME_TO_OP["Sharpness"], _enhancement),
    ("ShearX", _shear_x, lambda severity, sign: (sign * 0.3 * severity,)),
    ("ShearY", _shear_y, lambda severity, sign: (sign * 0.3 * severity,)),
    ("TranslateX", NAME_TO_OP["TranslateX"], lambda severity, sign: (sign * 0.45 * severity,)),
    ("TranslateY", NAME_TO_OP["TranslateY"], lambda severity, sign: (sign * 0.45 * severity,)),
)


MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")  # what a mask must follow


def rand_augment(pictures: list[np.ndarray], config: Config, generator: np.random.Generator) -> list[np.ndarray]:
    """Apply random operations to an image, each with probability one half, at a normally drawn magnitude.

    Uncovered corners are filled with the data's mean colour, as timm does.

    Args:
        pictures: the image, uint8 (H, W, 3), and its mask alike where there is one, which is moved with it.
        config: how many operations and how strong, ``data.mean`` and ``data.interpolation``.
        generator: where the draws come from.

    Returns:
        As ``pictures``.
    """
    augment = config.augment
    fill = tuple(min(255, round(255 * value)) for value in config.data.mean)
    resample = RESAMPLING[config.data.interpolation]
    for _ in range(augment.rand_augment_layers):
        name, operation, arguments = RAND_AUGMENT[generator.integers(len(RAND_AUGMENT))]
        if generator.random() < 0.5:
            magnitude = generator.normal(augment.rand_augment_magnitude, augment.rand_augment_std)
            sign = 1 if generator.random() < 0.5 else -1
            severity = min(max(magnitude, 0.0), 10.0) / 10
            drawn = arguments(severity, sign)
            pixels, *masks = pictures
            pixels = operation(pixels, *drawn, fill_value=fill, resample=resample)
            if name in MOVING:
                masks = [operation(mask, *drawn, fill_value=(0, 0, 0), resample=resample) for mask in masks]
            pictures = [pixels, *masks]
    return pictures


# --------------------------------------------------------------------------------------------------- batches


def mix_batch(
    images: np.ndarray, labels: np.ndarray, augment: AugmentConfig, num_classes: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mixup or cutmix of a batch with itself reversed, and its soft labels.

    mindcv's (and timm's) Mixup in mode ``batch``, step for step; a test holds the two equal. mindcv's own class
    draws from ``np.random``, which all threads share, and refuses odd batches, where the middle image simply
    meets itself. Mixed values are rounded to whole bytes, as in timm's FastCollateMixup.

    Args:
        images: uint8 (B, 3, S, S), or with more channels that are mixed alike; mixed in place.
        labels: int (B,).
        augment: which of the two, how often, and the labels' smoothing.
        num_classes: C.
        generator: where the draws come from.

    Returns:
        images as given and targets float32 (B, C), each row summing to 1.
    """
    share = 1.0  # of itself that an image keeps
    if (augment.mixup > 0 or augment.cutmix > 0) and generator.random() < augment.mix_probability:
        cut = augment.cutmix > 0 and (augment.mixup == 0 or generator.random() < 0.5)
        alpha = augment.cutmix if cut else augment.mixup
        share = float(generator.beta(alpha, alpha))
        if cut:
            height, width = images.shape[-2:]
            box_height, box_width = (int(side * math.sqrt(1 - share)) for side in (height, width))
            row, column = int(generator.integers(height)), int(generator.integers(width))
            top, bottom = max(row - box_height // 2, 0), min(row + box_height // 2, height)
            left, right = max(column - box_width // 2, 0), min(column + box_width // 2, width)
            images[:, :, top:bottom, left:right] = images[::-1, :, top:bottom, left:right].copy()
            share = 1 - (bottom - top) * (right - left) / (height * width)  # the border may have cut the box
        else:
            own, others = np.float32(share), np.float32(1 - share)
            for one, other in zip(images[: (len(images) + 1) // 2], images[::-1]):  # a pair at a time: 9 MB are slow
                mixed = np.rint(one * own + other * others)
                other[...] = np.rint(other * own + one * others)
                one[...] = mixed
    return images, mixup_target(labels, num_classes, share, augment.label_smoothing).astype(np.float32)


def drop_path_factors(model: ModelConfig, *, seed: int, step: int, rank: int, batch_size: int) -> np.ndarray:
    """What each sample's two residual branches of each block are multiplied by: float32 (depth, 2, B).

    0 with the block's rate, else 1 / (1 - rate); the rate grows linearly from 0 in the first block to
    ``drop_path`` in the last (stochastic depth, arXiv 1603.09382; timm's DropPath). ``step`` is the global step.
    """
    factors = np.empty((model.depth, 2, batch_size), np.float32)
    for block, rate in enumerate(np.linspace(0.0, model.drop_path, model.depth)):
        kept = keyed_generator(DROP_PATH, seed, step, rank, block).random((2, batch_size)) >= rate
        factors[block] = kept / (1 - rate)
    return factors


def dropout_seeds(model: ModelConfig, *, seed: int, step: int, rank: int) -> np.ndarray:
    """What dropout hashes with the place in the tensor: float32 (1 + depth, 3) in [0, 1), embedding first."""
    return keyed_generator(DROPOUT, seed, step, rank).random((1 + model.depth, 3), np.float32)


def random_scores(num_patches: int, batch_size: int, *key: int) -> np.ndarray:
    """Scores that order each image's patches by chance: float32 (B, N), permutations of 0 to N-1 over N.

    A permutation has no ties, so each choice of K patches is as likely as any other (random-LTD, arXiv 2211.11586;
    TREAD, arXiv 2501.04765).
    """
    ranks = np.tile(np.arange(num_patches, dtype=np.float32), (batch_size, 1))
    return keyed_generator(*key).permuted(ranks, axis=1) / np.float32(num_patches)


def given_scores(config: Config, batch_size: int, key: Sequence[int], maps: Optional[np.ndarray] = None) -> np.ndarray:
    """What comes with a batch for the spans that score by it (`config.given_spans`): float32 (G, B, N).

    Args:
        config: the spans, N.
        batch_size: B.
        key: of the random scores; the span's start is added.
        maps: (B, N), the masks' mean over each patch; needed where a span scores by ``mask``.
    """
    N = config.model.num_patches
    scores = []
    for span in given_spans(config):
        if span.score == "random":
            scores.append(random_scores(N, batch_size, *key, span.start))
        elif maps is not None:
            scores.append(maps)
        else:
            raise ValueError("a span scores by mask and no masks were given")
    return np.stack(scores)


def patch_means(masks: np.ndarray, patch_size: int) -> np.ndarray:
    """Mean of each patch, row by row: uint8 (B, S, S) to float32 (B, N) in 0..1."""
    B, S, _ = masks.shape
    grid = S // patch_size
    patches = masks.reshape(B, grid, patch_size, grid, patch_size)
    return (patches.mean(axis=(2, 4)) / 255).astype(np.float32).reshape(B, grid * grid)


class _Threads:
    """Maps a function over a batch's places, in order.

    Whole batches are MindSpore's unit and places are ours: many threads at one batch hold a few batches in memory,
    where MindSpore's own threads would hold 17 each. The threads start at first use, for a worker process that is
    forked with threads would inherit none of them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: Optional[ThreadPoolExecutor] = None

    def map(self, function: Callable[[int], Any], places: Iterable[int]) -> list[Any]:
        if self.count == 1:
            return [function(place) for place in places]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="skipvit-data")
        return list(self._pool.map(function, places))


def steps_per_epoch(images: int, global_batch_size: int) -> int:
    """Steps that use each of ``images`` at most once; a remainder smaller than a batch is left to other epochs.

    Raises:
        UserError: not even one batch.
    """
    if images < global_batch_size:
        raise UserError(
            f"data.batch_size: {global_batch_size} images a step over all ranks are more than the {images} of "
            "data.train; give a smaller one"
        )
    return images // global_batch_size


class TrainBatches:
    """A rank's training batches, in order, from any step on; item ``i`` is a whole batch.

    An epoch is a permutation of the images. Its positions are dealt out in order: step s, rank r, place i gets
    position ``s*G + r*B + i``, with B the rank's batch and G the global batch; what does not fill a G is left
    out. Position p shows image ``permutation[p // repeats]``. So the ranks' images are disjoint (``repeats`` 1),
    together the same for any number of ranks, and augmented alike.

    An image that cannot be read is replaced by the next in the permutation that can.

    Items are a tuple in the order of ``columns``:
        images: uint8 (B, 3, S, S).
        targets: float32 (B, C), label smoothing and mixing included.
        each extra column, of the global step ``epoch * steps_per_epoch + step``.
        scores: float32 (G, B, N), where a span is given its scores.

    Raises:
        UserError: the folder holds less than one global batch.
    """

    def __init__(
        self,
        folder: ImageFolder,
        config: Config,
        *,
        batch_size: int,
        epoch: int = 0,
        start: int = 0,
        epochs: int = 1,
        rank: int = 0,
        ranks: int = 1,
        extra_columns: Sequence[ExtraColumn] = (),
        masks: Optional[Path] = None,
    ) -> None:
        """Batches of ``epochs`` epochs from step ``start`` of ``epoch`` on.

        ``batch_size`` is the rank's. ``masks``, parallel to ``folder``, is needed where a span scores by ``mask``.
        """
        self.folder = folder
        self.given = given_spans(config)
        self.masks = masks if any(span.score == "mask" for span in self.given) else None
        self.config = config
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        self.extra_columns = tuple(extra_columns)
        self.columns = ["images", "targets", *(name for name, _ in self.extra_columns)]
        self.columns += ["scores"] * bool(self.given)
        self.steps_per_epoch = steps_per_epoch(len(folder), batch_size * ranks)
        self.first_step = epoch * self.steps_per_epoch + start
        self.last_step = (epoch + epochs) * self.steps_per_epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        # A byte an image, in memory that threads and forked processes share: what a worker finds unreadable the trainer
        # learns at its next look, though the batches themselves may go straight to the device (data sink).
        self._unreadable = np.frombuffer(mmap.mmap(-1, len(folder)), np.uint8)
        self._threads = _Threads(1 if config.data.worker_processes else config.data.num_workers)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        global_step = self.first_step + int(index)
        epoch, step = divmod(global_step, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        first = (step * self.ranks + self.rank) * self.batch_size
        size, seed = self.config.model.image_size, self.config.train.seed
        # A mask is a fourth channel up to here, so that mixing an image with another mixes their masks alike.
        images = np.zeros((self.batch_size, 3 if self.masks is None else 4, size, size), np.uint8)
        labels = np.zeros(self.batch_size, np.int32)

        def fill(place: int) -> None:
            image, mask, sample = self._readable(order, first + place)
            if image is not None:
                generator = keyed_generator(IMAGE, seed, epoch, first + place)
                images[place] = augment_image(image, self.config, generator, mask)
                labels[place] = self.folder.labels[sample]

        self._threads.map(fill, range(self.batch_size))
        images, targets = mix_batch(
            images,
            labels,
            self.config.augment,
            self.config.model.num_classes or len(self.folder.classes),
            keyed_generator(MIX, seed, global_step, self.rank),
        )
        columns = [column(global_step) for _, column in self.extra_columns]
        if self.given:
            maps = patch_means(images[:, 3], self.config.model.patch_size) if self.masks is not None else None
            columns.append(given_scores(self.config, self.batch_size, (SCORE, seed, global_step, self.rank), maps))
        return (np.ascontiguousarray(images[:, :3]), targets, *columns)

    def samples(self, index: int) -> np.ndarray:
        """Which images item ``index`` shows, were all readable: int (B,)."""
        epoch, step = divmod(self.first_step + index, self.steps_per_epoch)
        first = (step * self.ranks + self.rank) * self.batch_size
        return self._epoch_order(epoch)[np.arange(first, first + self.batch_size) // self.config.augment.repeats]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        known, order = self._order
        if known != epoch:
            order = keyed_generator(ORDER, self.config.train.seed, epoch).permutation(len(self.folder))
            self._order = (epoch, order)  # one assignment: another thread sees the old pair or the new
        return order

    def unreadable(self) -> np.ndarray:
        """The samples that were found unreadable so far, by whichever worker: int (…,), ascending."""
        return np.flatnonzero(self._unreadable)

    def _readable(self, order: np.ndarray, position: int) -> tuple[Optional[np.ndarray], Optional[np.ndarray], int]:
        """The image of a position or the next readable one, its mask and index; None where no image can be read."""
        place = position // self.config.augment.repeats
        for ahead in range(len(order)):
            sample = int(order[(place + ahead) % len(order)])
            if not self._unreadable[sample]:
                try:
                    image = read_image(self.folder.path(sample), least_training_side(self.config))
                    if self.masks is None:
                        return image, None, sample
                    mask = read_mask(mask_path(self.masks, self.folder.names[sample]), image.shape[1::-1])
                    return image, np.asarray(mask.convert("RGB")), sample
                except UnreadableImage:
                    self._unreadable[sample] = 1
        return None, None, -1


class UnreadableCount:
    """The images of a folder that could not be read so far, and the limit beyond which training stops.

    An image whose mask cannot be read counts as well, where there are ``masks``, and then the mask is named.
    """

    def __init__(self, folder: ImageFolder, max_share: float, masks: Optional[Path] = None) -> None:
        self.folder = folder
        self.max_share = max_share
        self.masks = masks
        self.samples: set[int] = set()

    def update(self, unreadable: np.ndarray) -> list[str]:
        """Take note of `TrainBatches.unreadable`; the paths that are new, to be named in the log.

        Raises:
            UserError: more than ``max_share`` of the folder's images, or all of them.
        """
        new = sorted({int(sample) for sample in unreadable} - self.samples)
        self.samples.update(new)
        share = len(self.samples) / len(self.folder)
        if share > self.max_share or share == 1:
            names = [str(unreadable_file(self.folder, sample, self.masks)) for sample in sorted(self.samples)]
            raise UserError(
                f"data.train: {len(names)} of {len(self.folder)} images cannot be read ({share:.2%}; "
                f"data.max_unreadable_share allows {self.max_share:.2%}): {first_names(names)}; "
                f"{why_unreadable(Path(names[0]))}"
            )
        return [str(unreadable_file(self.folder, sample, self.masks)) for sample in new]


class EvalBatches:
    """A rank's share of a folder in order, each image once over all ranks; item ``i`` is a whole batch.

    Step s, rank r, place i gets sample ``s*G + r*B + i``; all ranks have the same number of batches, and places
    beyond the last image are marked as not valid.

    Items are a tuple in the order of ``columns``:
        images: uint8 (B, 3, S, S); black where not valid.
        labels: int32 (B,); 0 for a place beyond the last image, -1 for an image that cannot be read.
        valid: int32 (B,); 1 for what is to be counted, else 0.
        scores: float32 (G, B, N), where a span is given its scores: random ones by the image's place in the folder.
    """

    def __init__(
        self,
        folder: ImageFolder,
        config: Config,
        *,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        skip_unreadable: bool = False,
        masks: Optional[Path] = None,
    ) -> None:
        """All of ``folder``; ``batch_size`` is the rank's. ``masks`` as for `TrainBatches`."""
        self.folder = folder
        self.given = given_spans(config)
        self.masks = masks if any(span.score == "mask" for span in self.given) else None
        self.config = config
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        self.skip_unreadable = skip_unreadable
        self.columns = ["images", "labels", "valid"] + ["scores"] * bool(self.given)
        self._threads = _Threads(1 if config.data.worker_processes else config.data.num_workers)

    def __len__(self) -> int:
        return math.ceil(len(self.folder) / (self.batch_size * self.ranks))

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        size = self.config.model.image_size
        images = np.zeros((self.batch_size, 3, size, size), np.uint8)
        labels = np.zeros(self.batch_size, np.int32)
        valid = np.zeros(self.batch_size, np.int32)
        scores = np.zeros((len(self.given), self.batch_size, self.config.model.num_patches), np.float32)
        samples = self.samples(int(index))

        def fill(place: int) -> None:
            sample = int(samples[place])
            if sample < 0:
                return
            try:
                image = open_image(self.folder.path(sample))
                if self.given:
                    key = (EVALUATION_SCORE, self.config.train.seed, sample)
                    scores[:, place] = given_scores(self.config, 1, key, self._map_of(sample, image.size))[:, 0]
            except UnreadableImage:
                labels[place] = -1
                return
            images[place] = evaluation_image(image, self.config)
            labels[place] = self.folder.labels[sample]
            valid[place] = 1

        self._threads.map(fill, range(self.batch_size))
        return (images, labels, valid, scores) if self.given else (images, labels, valid)

    def _map_of(self, sample: int, size: tuple[int, int]) -> Optional[np.ndarray]:
        """The mean of the mask over each patch of the image of ``size``, (1, N), where there are masks."""
        if self.masks is None:
            return None
        mask = evaluation_mask(mask_path(self.masks, self.folder.names[sample]), size, self.config)
        return patch_means(mask[None], self.config.model.patch_size)

    def samples(self, index: int) -> np.ndarray:
        """Which images item ``index`` holds: int (B,), -1 for places beyond the last."""
        first = (index * self.ranks + self.rank) * self.batch_size
        samples = np.arange(first, first + self.batch_size)
        return np.where(samples < len(self.folder), samples, -1)

    def check(self, index: int, labels: np.ndarray) -> list[int]:
        """The samples of item ``index`` that could not be read, told from its labels.

        Raises:
            UserError: there is one, and ``skip_unreadable`` is off. It is raised here and not by the item, since
                MindSpore would turn an error in a worker into one of its own.
        """
        samples = self.samples(index)[np.asarray(labels) < 0].tolist()
        if samples and not self.skip_unreadable:
            reason = why_unreadable(unreadable_file(self.folder, samples[0], self.masks))
            raise UserError(f"{reason}; mend or remove it (or evaluate with --skip-unreadable)")
        return samples


def to_dataset(source: Union[TrainBatches, EvalBatches]) -> mindspore.dataset.GeneratorDataset:
    """A MindSpore dataset whose rows are the source's items, in order, with ``data.num_workers`` at work.

    Workers are threads that share each batch, or processes that each make whole batches
    (``data.worker_processes``): decoding runs in both, but mindcv's operations hold Python's lock, so many cores
    are only fed by processes. MindSpore's prefetch size is set for the whole process: it has no other place.
    """
    data, model = source.config.data, source.config.model
    mindspore.dataset.config.set_prefetch_size(PREFETCH_BATCHES)
    workers, options = 1, {}
    if data.worker_processes:
        workers = min(data.num_workers, os.cpu_count() or 1)  # MindSpore refuses more
        if inspect.signature(mindspore.dataset.GeneratorDataset.__init__).parameters["max_rowsize"].default:
            # The older releases share memory of a fixed size with their workers, 6 MB a row unless told; the
            # newer ones find it out and warn when told.
            classes = model.num_classes or len(source.folder.classes)
            row_bytes = source.batch_size * (3 * model.image_size**2 + 4 * classes)
            options["max_rowsize"] = 2 + row_bytes // 2**20
    return mindspore.dataset.GeneratorDataset(
        source,
        column_names=source.columns,
        shuffle=False,
        num_parallel_workers=workers,
        python_multiprocessing=data.worker_processes,
        **options,
    )


# ----------------------------------------------------------------------------------------------------- masks


def mask_path(masks: Path, name: str) -> Path:
    """The mask of the image ``name`` (`ImageFolder.names`): the same name in ``masks``, as PNG."""
    return (masks / name).with_suffix(".png")


def check_masks(masks: Optional[Path], folder: ImageFolder, where: str) -> None:
    """Refuse ``masks``, given as the key or option ``where``, unless each image of ``folder`` has one.

    Raises:
        UserError: naming the first that are missing.
    """
    if masks is None:
        raise UserError(f"{where}: not given; skip.score=mask needs a folder with a mask of each image")
    missing = [name for name in folder.names if not mask_path(masks, name).is_file()]
    if missing:
        raise UserError(
            f"{where}: {masks} has no mask of {first_names(missing)}; put it there under the image's name, as PNG"
        )


def evaluation_mask(path: Path, size: tuple[int, int], config: Config) -> np.ndarray:
    """The mask of an image of ``size`` (width, height) in evaluation's geometry: uint8 (S, S).

    Raises:
        UnreadableImage: it is missing or no image.
    """
    mask = read_mask(path, size)
    return np.asarray(resize_and_crop(mask, config.model.image_size, config.data.val_crop_ratio, Inter.NEAREST))


def object_patches(path: Path, size: tuple[int, int], config: Config) -> np.ndarray:
    """The share of each patch that the object covers, in evaluation's geometry: float32 (N,), row by row.

    The mask, of an image of ``size`` (width, height), is white on the object and black elsewhere.

    Raises:
        UserError: the mask is missing or no image.
    """
    try:
        mask = evaluation_mask(path, size, config)
    except UnreadableImage as error:
        raise UserError(f"data.masks: {error}") from None
    return patch_means(np.where(mask > 127, np.uint8(255), np.uint8(0))[None], config.model.patch_size)[0]


def first_names(names: Sequence[str]) -> str:
    """The first few of many names, and how many there are besides, for a message."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
