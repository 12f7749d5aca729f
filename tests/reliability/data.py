"""Broken images by mutation, through train, evaluate, predict and visualize.

No command may crash or hang; what cannot be read is named by each of them, and all else is used.
"""

import io
import json
import os
import random
import socket
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import runs
from PIL import Image

from skipvit.data import MAX_IMAGE_BYTES
from skipvit.log import one_line

COUNT = 200
SECONDS = 200  # that a command may take
GOOD = 12  # sound images beside the broken ones, a class
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
CLASSES = ("crow", "heron")


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width=24, height=20, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png(width, height, *more):
    """A PNG that claims a size and has no pixels; ``more`` are chunks."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    extra = b"".join(chunk(kind, body) for kind, body in more)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b""))


def tiff(width, height, tag=None):
    """A TIFF of one strip that claims a size."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (279, 4, 8)]
    entries += [tag] if tag else []
    body = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + bytes(4)


def bombs():
    jpeg = bytearray(encoded(noise(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    bitmap = bytearray(encoded(noise(), "BMP"))
    bitmap[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    gif = bytearray(encoded(noise(), "GIF"))
    gif[6:10] = b"\xff" * 4
    text = zlib.compress(bytes(80 << 20))
    yield "100,000 x 100,000", ".png", png(100_000, 100_000)
    yield "10,000 x 9,000", ".png", png(10_000, 9_000)
    yield "no pixels at all", ".png", png(0, 0)
    yield "JPEG of 65,535 a side", ".jpg", bytes(jpeg)
    yield "BMP of 2^31 a side", ".bmp", bytes(bitmap)
    yield "GIF of 65,535 a side", ".gif", bytes(gif)
    yield "TIFF of 2^32 a side", ".tif", tiff(2**32 - 1, 2**32 - 1)
    yield "TIFF of 2^31 rows", ".tif", tiff(1, 2**31)
    yield "80 MB of compressed text", ".png", png(24, 20, (b"zTXt", b"a\0\0" + text))
    yield "80 MB of colour profile", ".png", png(24, 20, (b"iCCP", b"a\0\0" + text))


def sound():
    """Odd, and to be read: (what, suffix, content)."""
    image = noise()
    for form, suffix in FORMATS.items():
        yield f"1 x 1 {form}", suffix, encoded(noise(1, 1), form)
        yield f"{form} under a wrong suffix", ".png" if form == "JPEG" else ".jpg", encoded(image, form)
    yield "20,000 x 1", ".png", encoded(noise(20_000, 1), "PNG")
    yield "1 x 20,000", ".png", encoded(noise(1, 20_000), "PNG")
    yield "20,000 x 1 JPEG", ".jpg", encoded(noise(20_000, 1), "JPEG")
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 130)
    yield "16-bit PNG", ".png", encoded(deep, "PNG")
    yield "16-bit TIFF", ".tif", encoded(deep, "TIFF")
    for form in ("JPEG", "TIFF"):
        yield f"CMYK {form}", FORMATS[form], encoded(image.convert("CMYK"), form)
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"PNG of mode {mode}", ".png", encoded(image.convert(mode), "PNG")
    yield "palette with a transparent colour", ".png", encoded(image.convert("P"), "PNG", transparency=3)
    yield "palette with transparencies", ".png", encoded(image.convert("P"), "PNG", transparency=bytes(range(250)))
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        frames = {"save_all": True, "append_images": [noise(seed=1), noise(seed=2)]}
        yield f"animated {form}", FORMATS[form], encoded(image, form, **frames)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"EXIF rotation {orientation}", ".jpg", encoded(image, "JPEG", exif=exif)
    yield "broken EXIF", ".jpg", encoded(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    yield "progressive", ".jpg", encoded(image, "JPEG", progressive=True)


NAMES = (
    b"two blanks",
    b"line\nbreak",
    b"tab\tab",
    "鸟 ü".encode(),
    b"\xff\xfe undecodable",
    b"\x1b[31mescape",
    b"-dash",
)
NAMES += (b"$\\frac{x$", b"%s %(x)s {0}", b"'\"`;$(touch x)", b"a" * 240, b"..png..", b"=key=value", b"#hash", b"*?[x]")


def spoilt(count, generator):
    """Not to be read, or perhaps: (what, suffix, content, whether it must fail). Without end."""
    yield from ((f"bomb: {what}", suffix, content, True) for what, suffix, content in bombs())
    for suffix in FORMATS.values():
        yield f"nothing in a {suffix}", suffix, b"", True
    for what, content in {
        "text": b"I am no image.\n" * 50,
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "PPM": b"P6 2 2 255\n" + bytes(12),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zeros": bytes(5000),
        "noise": generator.randbytes(5000),
        "a ZIP": b"PK\x03\x04" + bytes(100),
    }.items():
        yield what, ".jpg", content, True
    for what, values in {
        "floating point": np.ones((4, 4), np.float32),
        "32-bit": np.full((4, 4), -5, np.int32),
    }.items():
        yield what, ".tif", encoded(Image.fromarray(values), "TIFF"), True
    whole = {form: encoded(noise(64, 48), form) for form in FORMATS}
    while True:
        form = generator.choice(["JPEG", "JPEG", *FORMATS])
        content = whole[form]
        length = generator.randrange(1, len(content))
        if generator.random() < 0.6:
            # What is missing at the very end may be no pixel.
            surely = length < 0.9 * len(content) and form != "TIFF"
            yield f"{form} cut to {length}", FORMATS[form], content[:length], surely or None
        else:
            broken = bytearray(content)
            for _ in range(generator.randrange(1, 20)):
                broken[generator.randrange(len(content))] = generator.randrange(256)
            yield f"{form} with wrong bytes", FORMATS[form], bytes(broken), None


def special(folder):
    """What is no ordinary file: (what, path, whether it must fail)."""
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "memory.jpg").symlink_to("/proc/self/mem")
    (folder / "messages.jpg").symlink_to("/proc/kmsg")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket is short
        listener.bind("socket.jpg")
        os.chdir(here)
    with open(folder / "sparse.webp", "wb") as file:
        file.write(encoded(noise(), "WEBP"))
        file.truncate(MAX_IMAGE_BYTES + 1)
    (folder / "folder.jpg").mkdir()  # as any folder: nothing in it, nothing of it
    (folder / "up").symlink_to(folder.parent)
    names = (
        "nowhere.png",
        "self.png",
        "zero.jpg",
        "memory.jpg",
        "messages.jpg",
        "pipe.png",
        "socket.jpg",
        "sparse.webp",
    )
    return [(name.split(".")[0], folder / name, True) for name in names]


def make_folder(root, count, seed=3):
    """Class folders with sound images and ``count`` others: what each path is, and whether it must fail."""
    runs.write_images(root, GOOD * len(CLASSES), CLASSES)
    generator = random.Random(seed)
    inputs = [(what, path, fails) for what, path, fails in special(root / CLASSES[0])]
    odd = [(what, suffix, content, False) for what, suffix, content in sound()]
    odd += [(f"name {name!r}", name + b".png", encoded(noise(), "PNG"), False) for name in NAMES]
    if len(odd) > count // 3:
        odd = generator.sample(odd, count // 3)
    broken = spoilt(count, generator)
    while len(odd) + len(inputs) < count:
        odd.append(next(broken))
    for index, (what, name, content, fails) in enumerate(odd):
        name = os.fsencode(f"{index:03d}{name}") if isinstance(name, str) else name
        path = Path(os.fsdecode(os.path.join(os.fsencode(root / CLASSES[index % 2]), name)))
        path.write_bytes(content)
        inputs.append((what, path, fails))
    return inputs


# ------------------------------------------------------------------------------------------------- the commands


def named_by_train(work):
    recipe = runs.write_recipe(work / "recipe.yaml", data={"max_unreadable_share": 1.0, "num_workers": 2})
    ended = runs.run("train", recipe, "train.epochs=2", "optim.warmup_epochs=0", cwd=work, timeout=SECONDS)
    log = (work / "run" / "train.log").read_text(encoding="utf-8")
    marks = ("cannot be read, the next image took its place: ", "left out of the validation, cannot be read: ")
    found = [{line.split(mark, 1)[1] for line in log.splitlines() if mark in line} for mark in marks]
    return ended, [
        {name.replace("train/", "", 1) for name in found[0]},
        {name.replace("val/", "", 1) for name in found[1]},
    ]


def named_by_evaluate(work):
    ended = runs.run(
        "evaluate", "good.ckpt", "--data", "val", "--skip-unreadable", "--batch-size", 8, cwd=work, timeout=SECONDS
    )
    mark = "left out, cannot be read: val/"
    return ended, [{line[len(mark) :] for line in ended.stdout.splitlines() if line.startswith(mark)}]


def named_by_predict(work):
    ended = runs.run("predict", "good.ckpt", "val", "--json", "--skip-unreadable", cwd=work, timeout=SECONDS)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return ended, [{one_line(Path(line["image"]).relative_to("val")) for line in lines if "error" in line}]


def named_by_visualize(work):
    """By portions, for a picture holds 64 images; what is no file is refused by its name before anything is read."""
    images = sorted(path for path in listed(work / "val"))
    named = {one_line(path.relative_to(work / "val")) for path in images if not path.is_file()}
    images, mark = [path for path in images if path.is_file()], "left out, cannot be read: val/"
    for first in range(0, len(images), 60):
        chosen = [Path("val", path.relative_to(work / "val")) for path in images[first : first + 60]]
        ended = runs.run(
            "visualize", "good.ckpt", *chosen, "--skip-unreadable", "-o", "tokens.png", cwd=work, timeout=SECONDS
        )
        named |= {line[len(mark) :] for line in ended.stdout.splitlines() if line.startswith(mark)}
        if ended.returncode:
            break
    return ended, [named]


def listed(root):
    return [Path(folder, name) for folder, _, names in os.walk(root) for name in names]


COMMANDS = {
    "train": named_by_train,
    "evaluate": named_by_evaluate,
    "predict": named_by_predict,
    "visualize": named_by_visualize,
}


def run(work: Path, count: int, commands=tuple(COMMANDS)) -> dict:
    """Put ``count`` inputs among sound images and give them to the commands."""
    work.mkdir(parents=True, exist_ok=True)
    make_folder(work / "train", count)
    inputs = make_folder(work / "val", count)
    runs.write_checkpoint(work / "good.ckpt", CLASSES)
    reports, lost = {}, []
    for name in commands:
        started = time.monotonic()
        try:
            ended, named = COMMANDS[name](work)
        except subprocess.TimeoutExpired:
            lost.append(f"{name}: hung")
            continue
        if ended.returncode or ended.stderr:
            lost.append(f"{name}: exit {ended.returncode}: {ended.stderr[-300:].strip()}")
            continue
        reports[name] = named
        print(f"{name}: {[len(part) for part in named]} named, {time.monotonic() - started:.0f} s", flush=True)
    everything = {one_line(path.relative_to(work / "val")): fails for _, path, fails in inputs}
    good = {one_line(path.relative_to(work / "val")) for path in listed(work / "val")} - set(everything)
    sets = [part for parts in reports.values() for part in parts]
    failed = 0
    for what, path, fails in inputs:
        name = one_line(path.relative_to(work / "val"))
        said = {name in part for part in sets}
        failed += said == {True}
        if len(said) > 1 or (fails is not None and said != {fails}):
            lost.append(f"{what}: named as unreadable by {[name in part for part in sets]}, must be: {fails}")
    lost += [f"a sound image is refused: {name}" for name in good if any(name in part for part in sets)]
    lost += [removed_while_it_runs(work)] if "train" in commands else []
    lost = [case for case in lost if case]
    return {
        "tried": len(inputs),
        "survived": max(0, len(inputs) - len(lost)),
        "lost": len(lost),
        "cases": lost,
        "unreadable": failed,
        "used": len(inputs) - failed,
        "commands": list(commands),
    }


def removed_while_it_runs(work):
    """Images go and folders come while a run is at it: what was lost by that, None for nothing."""
    here = work / "changing"
    runs.write_images(here / "train", 40, CLASSES)
    runs.write_images(here / "val", 8, CLASSES)
    recipe = runs.write_recipe(here / "recipe.yaml", data={"max_unreadable_share": 0.5})
    process = subprocess.Popen(
        runs.command("train", recipe, "train.epochs=40"),
        cwd=here,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    gone, said = ("train/crow/000.png", "val/crow/000.png"), ""
    try:
        for line in process.stdout:
            said += line
            if "first step" in line:
                for name in gone:
                    (here / name).unlink()
                for part in ("train", "val"):
                    runs.write_images(here / part, 4, ("owl",))
        code = process.wait(SECONDS)
    finally:
        process.kill()
    if code or not all(
        f"cannot be read, the next image took its place: {name}" in said or f"cannot be read: {name}" in said
        for name in gone
    ):
        return f"removed while it runs: exit {code}: {said[-500:]}"
    return None
