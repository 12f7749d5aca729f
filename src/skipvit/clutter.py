"""The embedded data set `clutter`: small textured objects on large, varied backgrounds.

Each picture shows one object, about 16 to 22 units across (a unit is a 64th of the picture's width), somewhere.
Its texture is its class (`stripes_horizontal`, `rings`, ...). Everything else is there to be ignored: a background of
soft colours with a faint weave, a random mixture of all the textures; and two to four distractors of the object's
sizes, outlines and colours, plain or with textures that are no class. No colour and no outline is tied to a class.

What makes the classes learnable in a few hundred steps, by a small ViT from scratch: a texture is fixed to the
picture's grid, not to the object, which is a hole through which a cloth of period 4 or 8 units shows; and the
texture's marked part has the lighter of the object's two colours. With patches of 8 units each patch inside an object
of a class then shows one and the same pattern. (Where chance said which part was lighter, a ViT that otherwise passed
95% within 300 steps of 32 pictures stayed at chance.) The weave keeps it from being too easy: without it a linear
classifier of the mean of a picture's 64 patches is right on 99% of unseen pictures, with it on 81%, so it pays to
find the object. Textures are their own mirror images about a patch's vertical middle: a picture flipped left to right
is one of its class. Flipped upside down or shifted it shows a pattern that training has not seen.

On disk it is an ordinary image folder with the objects' masks in a parallel one:

    clutter.json                        the version, configuration and class names
    train/<class>/<index>.png           mode RGB
    val/<class>/<index>.png
    masks/train/<class>/<index>.png     mode L: 255 on the object's pixels, 0 elsewhere
    masks/val/<class>/<index>.png

A picture is a pure function of (seed, split, class, index). It is computed from uniform random numbers by additions,
multiplications, divisions, remainders and comparisons of float64, element by element: IEEE 754 fixes their results on
every machine and release, which it does not for sines, matrix products and long sums.
"""

import errno
import functools
import json
import os
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from PIL import Image

from skipvit.config import UserError

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Part of the cache folder's name: raise it whenever a pixel or the layout changes.
VERSION = 2
SPLITS = ("train", "val")
_MANIFEST = "clutter.json"

_WIDTH = 64.0  # the picture's width in units; all lengths below are in units, whatever the size in pixels
_SMALLEST_RADIUS, _LARGEST_RADIUS = 8.0, 11.0
_STALE_SECONDS = 24 * 3600.0  # a generation takes seconds; a temporary folder of this age has no owner any more


# --- the classes ----------------------------------------------------------------------------------------------------


def _from_middle(position: np.ndarray, period: float) -> np.ndarray:
    """Distance from the middle of the cell of `period` units in which each position lies, in [0, period / 2]."""
    return np.abs(position % period - period / 2)


def _squared_radius(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Squared distance from the middle of each cell of 8 x 8 units."""
    vertical, horizontal = _from_middle(y, 8), _from_middle(x, 8)
    return vertical * vertical + horizontal * horizontal


# Each maps the pixels' y and x in units (both arrays of the picture's shape) to the part of the cloth that has the
# lighter colour. As vectors over a cell of 8 x 8 units no two have a correlation above 0.53 in magnitude.
TEXTURES: dict[str, Texture] = {
    "stripes_horizontal": lambda y, x: y % 4 < 2,
    "stripes_vertical": lambda y, x: _from_middle(x, 4) < 1,
    "bands_horizontal": lambda y, x: y % 8 < 4,
    "bands_vertical": lambda y, x: _from_middle(x, 8) < 2,
    "checkers_coarse": lambda y, x: (y % 8 < 4) ^ (_from_middle(x, 8) < 2),
    "checkers_fine": lambda y, x: (y % 4 < 2) ^ (_from_middle(x, 4) < 1),
    "dots": lambda y, x: _squared_radius(y, x) < 7.5,
    "rings": lambda y, x: (_squared_radius(y, x) > 4) & (_squared_radius(y, x) < 15),
    "grid": lambda y, x: (y % 4 < 1) | (_from_middle(x, 8) < 1),
    "zigzag": lambda y, x: (y + _from_middle(x, 8)) % 8 < 4,
}


@dataclass(frozen=True)
class ClutterConfig:
    """What to generate.

    Attributes:
        image_size: width and height of a picture, pixels, 32 to 1024. The scene is the same at every size.
        classes: number of classes, 2 to 10: the first so many of `TEXTURES`.
        train_images_per_class: pictures of each class under `train/`, 1 or more.
        val_images_per_class: pictures of each class under `val/`, 1 or more.
        seed: 0 or more; another seed gives entirely other pictures.

    Raises:
        UserError: if a value is not a whole number in its range.
    """

    image_size: int = 64
    classes: int = 10
    train_images_per_class: int = 500
    val_images_per_class: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        ranges = {
            "image_size": (32, 1024),
            "classes": (2, len(TEXTURES)),
            "train_images_per_class": (1, 10**6),
            "val_images_per_class": (1, 10**6),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"clutter: {name} is {value!r}; it must be a whole number from {low} to {high}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names, in the order of their numbers in `render` (not alphabetical)."""
        return tuple(TEXTURES)[: self.classes]

    def images_per_class(self, split: str) -> int:
        """Number of pictures of each class in `split`, `"train"` or `"val"`."""
        return {"train": self.train_images_per_class, "val": self.val_images_per_class}[split]


# --- one picture ----------------------------------------------------------------------------------------------------


def render(config: ClutterConfig, split: str, class_name: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture: a function of `config.image_size`, `config.seed` and the other arguments only.

    Args:
        config: its counts do not matter here: `index` may be beyond them.
        split: `"train"` or `"val"`.
        class_name: a key of `TEXTURES`.
        index: the picture's number in its class and split, 0 or more.

    Returns:
        The picture `(image_size, image_size, 3)` and the object's mask `(image_size, image_size)`, 0 or 255; uint8.
    """
    key = [config.seed, SPLITS.index(split), list(TEXTURES).index(class_name), index]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    size = config.image_size
    y, x = _pixel_centres(size)

    picture = _background(generator, size)
    for _ in range(2 + _below(generator, 3)):
        inside, across, along = _blob(generator, y, x, whole=False)
        lighter, darker = _colours(generator)
        amount = _distractor_texture(generator, across, along)[:, :, None]
        picture = np.where(inside[:, :, None], darker + (lighter - darker) * amount, picture)

    # Last, so that nothing hides the object and its mask is exact.
    mask, _, _ = _blob(generator, y, x, whole=True)
    lighter, darker = _colours(generator)
    texture = TEXTURES[class_name](y, x)
    picture = np.where(mask[:, :, None], np.where(texture[:, :, None], lighter, darker), picture)

    light = 0.7 + 0.4 * _smooth_field(generator, 2, size)
    noise = 24.0 * (generator.random((size, size)) - 0.5)
    picture = picture * light[:, :, None] + noise[:, :, None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), mask.astype(np.uint8) * np.uint8(255)


def _below(generator: np.random.Generator, count: int) -> int:
    """A whole number from 0 to `count - 1`."""
    # Not Generator.integers: of its methods `random` is the one least likely to change its stream in a later release.
    return int(count * generator.random())


def _background(generator: np.random.Generator, size: int) -> np.ndarray:
    """A large soft scene `(size, size, 3)`, of one of four kinds, in colours nearer to grey than the objects'."""
    kind = _below(generator, 4)
    first, second, third = (
        _rgb(generator.random(), 0.8 * generator.random(), 0.25 + 0.7 * generator.random()) for _ in range(3)
    )
    if kind == 0:  # a slope from one colour to another
        scene = first + (second - first) * _smooth_field(generator, 2, size)[:, :, None]
    elif kind == 1:  # clouds
        clouds = 0.6 * _smooth_field(generator, 4, size) + 0.4 * _smooth_field(generator, 9, size)
        tint = _smooth_field(generator, 3, size) - 0.5
        scene = first + (second - first) * clouds[:, :, None] + (third - first) * tint[:, :, None]
    elif kind == 2:  # blotches with soft edges, in three colours
        blotches = np.clip(8 * _smooth_field(generator, 7, size) - 3.5, 0, 1)
        spots = np.clip(8 * _smooth_field(generator, 6, size) - 5.2, 0, 1)
        scene = first + (second - first) * blotches[:, :, None]
        scene = scene + (third - scene) * spots[:, :, None]
    else:  # an out-of-focus photograph: red, green and blue each on their own
        scene = 40 + 180 * np.stack([_smooth_field(generator, 4, size) for _ in range(3)], axis=2)
    return 128 + 0.6 * (scene - 128) + _weave(generator, size)[:, :, None]


def _weave(generator: np.random.Generator, size: int) -> np.ndarray:
    """All textures at once, each lightly and with a random sign, `(size, size)`: so the background holds them too."""
    strength = 5 * generator.random()
    weave = np.zeros((size, size))
    for texture in _textures_in_full(size):
        weight = strength * (2 * generator.random() - 1)
        weave = weave + np.where(texture, weight, -weight)
    return weave


@functools.lru_cache(maxsize=1)
def _textures_in_full(size: int) -> tuple[np.ndarray, ...]:
    """Each texture over a whole picture, `(size, size)`, bool; kept, as every picture needs them."""
    y, x = _pixel_centres(size)
    return tuple(texture(y, x) for texture in TEXTURES.values())


def _pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The y and x of each pixel's middle in units, each `(size, size)`."""
    centres = (np.arange(size) + 0.5) * (_WIDTH / size)
    return np.repeat(centres[:, None], size, axis=1), np.repeat(centres[None, :], size, axis=0)


def _smooth_field(generator: np.random.Generator, knots: int, size: int) -> np.ndarray:
    """A random field `(size, size)` in [0, 1): `knots` x `knots` random values, smoothly interpolated."""
    values = generator.random((knots, knots))
    position = (np.arange(size) + 0.5) * ((knots - 1) / size)
    knot = position.astype(np.int64)
    weight = position - knot
    weight = weight * weight * (3 - 2 * weight)
    rows = values[knot] + (values[knot + 1] - values[knot]) * weight[:, None]
    return rows[:, knot] + (rows[:, knot + 1] - rows[:, knot]) * weight[None, :]


def _blob(
    generator: np.random.Generator, y: np.ndarray, x: np.ndarray, whole: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An outline of random kind, place, size and turn; `whole`: no part of it beyond the picture's edge.

    Returns:
        The pixels inside it, and each pixel's two coordinates in the outline's own frame, where it has a radius of
        about 1; all of the picture's shape.
    """
    radius = _SMALLEST_RADIUS + (_LARGEST_RADIUS - _SMALLEST_RADIUS) * generator.random()
    outline = _OUTLINES[_below(generator, len(_OUTLINES))]
    # The rational parametrisation of the circle: a turn between -90 and 90 degrees without sines.
    slope = 2 * generator.random() - 1
    cosine, sine = (1 - slope * slope) / (1 + slope * slope), 2 * slope / (1 + slope * slope)
    margin = 1.2 * radius if whole else 4.0
    centre_y = margin + (_WIDTH - 2 * margin) * generator.random()
    centre_x = margin + (_WIDTH - 2 * margin) * generator.random()
    down, right = (y - centre_y) / radius, (x - centre_x) / radius
    across, along = cosine * down - sine * right, sine * down + cosine * right
    return outline(across, along), across, along


# Each takes coordinates in the outline's own frame and reaches no further than 1.2 from its middle.
_OUTLINES: tuple[Texture, ...] = (
    lambda v, u: u * u + v * v < 1,  # disc
    lambda v, u: u * u + 1.7 * v * v < 1.1,  # ellipse
    lambda v, u: np.maximum(np.abs(u), np.abs(v)) < 0.82,  # square
    lambda v, u: (u * u) * (u * u) + (v * v) * (v * v) < 0.75,  # square with round corners
    lambda v, u: np.maximum(-v, 0.5 * v + 0.866 * np.abs(u)) < 0.6,  # triangle
    lambda v, u: np.maximum(np.abs(u), 0.5 * np.abs(u) + 0.866 * np.abs(v)) < 0.92,  # hexagon
)


def _distractor_texture(generator: np.random.Generator, across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """How much of the lighter colour each pixel has, `(size, size)` in [0, 1]: one of five textures of no class."""
    size = len(across)
    kind = _below(generator, 5)
    if kind == 0:
        amount = np.zeros_like(across)  # plain
    elif kind == 1:
        amount = generator.random((size, size))  # speckled
    elif kind == 2:
        amount = np.clip(0.5 + 0.6 * along, 0, 1)  # shaded like a cylinder
    elif kind == 3:
        amount = np.where(across * across + along * along < 0.3, 1.0, 0.0)  # one large spot
    else:
        amount = np.clip(3 * _smooth_field(generator, 16, size) - 1, 0, 1)  # marbled
    return amount if generator.random() < 0.5 else 1 - amount


def _colours(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A lighter and a darker colour `(3,)`, 0 to 255, of unrelated hues; objects and distractors alike use it."""
    lighter = _rgb(generator.random(), 0.1 + 0.7 * generator.random(), 0.7 + 0.3 * generator.random())
    darker = _rgb(generator.random(), generator.random(), 0.1 + 0.25 * generator.random())
    return lighter, darker


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Red, green and blue `(3,)`, 0 to 255, of a colour given as hue, saturation and value, each in [0, 1]."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))


# --- the folder -----------------------------------------------------------------------------------------------------


def generate(root: Path, config: ClutterConfig) -> None:
    """Write the whole data set as the new folder `root`, all of it or nothing.

    It is made in a hidden folder beside `root` and renamed at the end. A process killed meanwhile leaves only that
    folder (`.<root's name>.<random>.tmp`) behind.

    Args:
        root: must not exist; parent folders are made as needed.
        config: what to generate.

    Raises:
        FileExistsError: if `root` exists, or came to exist meanwhile; it is left as it is.
        OSError: if it cannot be written.
    """
    if os.path.lexists(root):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(root))
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = root.with_name(f".{root.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        _write(temporary, config)
        try:
            os.replace(temporary, root)
        except OSError as error:
            if root.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(root)) from error
            raise
        _flush_folder(root.parent)
    except BaseException:  # an interrupt too: nothing half-made stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise


DEFAULT_CONFIG = ClutterConfig()


def ensure(config: ClutterConfig = DEFAULT_CONFIG, cache: Optional[Path] = None) -> Path:
    """The data set's folder, generated on first use.

    Several processes may call this at once: each that finds nothing generates, the first to finish is kept.

    Args:
        config: what to generate.
        cache: the folder that holds the data sets, one sub-folder a configuration; if None, `$SKIPVIT_CACHE`, else
            `$XDG_CACHE_HOME/skipvit`, else `~/.cache/skipvit`.

    Returns:
        The folder with `train`, `val` and `masks`, as an absolute path.

    Raises:
        UserError: if it cannot be written or read, or what lies in its place is not the whole data set.
    """
    folder = _cache_folder() if cache is None else Path(cache).absolute()
    root = folder / _folder_name(config)
    try:
        _remove_stale(folder)
        if not root.exists():
            try:
                generate(root, config)
            except FileExistsError:
                if not root.is_dir():
                    raise
        missing = _missing(root, config)
    except OSError as error:
        raise UserError(
            f"cannot keep the data set clutter in {folder}: {error.strerror or error}; "
            "set SKIPVIT_CACHE to a folder that can be written and has room"
        ) from error
    if missing:
        raise UserError(
            f"the data set clutter in {root} is not whole ({missing}); delete that folder, and it is made anew"
        )
    return root


def _cache_folder() -> Path:
    """Where data sets are kept, as the environment says; absolute."""
    own = os.environ.get("SKIPVIT_CACHE", "")
    if own:
        return Path(os.path.expanduser(own)).absolute()
    general = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(general):  # the XDG specification has relative ones ignored
        return Path(general) / "skipvit"
    return Path(os.path.expanduser("~")).absolute() / ".cache" / "skipvit"


def _folder_name(config: ClutterConfig) -> str:
    """The data set's folder in the cache: readable, and another for every version and configuration."""
    counts = f"{config.classes}x{config.train_images_per_class}+{config.val_images_per_class}"
    return f"clutter-v{VERSION}-{config.image_size}px-{counts}-seed{config.seed}"


def _manifest(config: ClutterConfig) -> dict[str, Any]:
    """What `clutter.json` holds."""
    return {"version": VERSION, "config": asdict(config), "classes": list(config.class_names)}


def _write(root: Path, config: ClutterConfig) -> None:
    """Write every file of the data set into the empty folder `root`."""
    for split in SPLITS:
        for class_name in config.class_names:
            pictures, masks = root / split / class_name, root / "masks" / split / class_name
            pictures.mkdir(parents=True)
            masks.mkdir(parents=True)
            for index in range(config.images_per_class(split)):
                picture, mask = render(config, split, class_name, index)
                _write_png(pictures / f"{index:06d}.png", picture)
                _write_png(masks / f"{index:06d}.png", mask)
    with open(root / _MANIFEST, "w", encoding="utf-8") as file:
        json.dump(_manifest(config), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(root)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """Write `(height, width, 3)` as an RGB or `(height, width)` as an L picture."""
    # Not flushed one by one: 12,000 times that costs more than all the drawing on some disks. What a power cut then
    # leaves behind is empty files, which `_missing` finds. Level 1, as the noise does not compress any better at 9.
    Image.fromarray(pixels).save(path, format="PNG", compress_level=1)


def _flush_folder(folder: Path) -> None:
    """Have the folder's entries on the disk, where the system can do that for a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _missing(root: Path, config: ClutterConfig) -> str:
    """What the folder `root` lacks of the data set, in a few words; empty if nothing. Names and sizes are looked at."""
    try:
        manifest = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return f"no readable {_MANIFEST}"
    if manifest != _manifest(config):
        return f"another version or configuration in {_MANIFEST}"
    for split in SPLITS:
        expected = config.images_per_class(split)
        for class_name in config.class_names:
            for part in (Path(split, class_name), Path("masks", split, class_name)):
                try:
                    with os.scandir(root / part) as entries:
                        found = sum(entry.name.endswith(".png") and entry.stat().st_size > 0 for entry in entries)
                except (FileNotFoundError, NotADirectoryError):
                    found = 0
                if found != expected:
                    return f"{part} has {found} whole pictures, not {expected}"
    return ""


def _remove_stale(folder: Path) -> None:
    """Remove what killed generations left in the cache folder, once it is old enough to belong to nobody."""
    for temporary in folder.glob(".clutter-v*.tmp") if folder.is_dir() else ():
        try:
            age_seconds = time.time() - temporary.stat().st_mtime
        except OSError:  # its owner finished or discarded it meanwhile
            continue
        if age_seconds > _STALE_SECONDS:
            shutil.rmtree(temporary, ignore_errors=True)
