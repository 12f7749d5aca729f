"""Files from strangers: checkpoints and safetensors that are cut, flipped, or made to harm.

Each case is opened as the commands open it, in a process of its own kind that may die: what dies, ends with a
traceback, takes too much memory or time, or gives other weights than were written, is lost.
"""

import contextlib
import hashlib
import io
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import runs
import safetensors.numpy

from skipvit import checkpoint, config, convert, predict
from skipvit.log import run_command
from skipvit.model import VisionTransformer

COUNT = 200
SECONDS = 30  # that one case may take
EXTRA_BYTES = 6 << 30  # of address space, above what the child has when it begins
CLASSES = ("crow", "heron")


# ------------------------------------------------------------------------------------------- protobuf, by hand


def varint(number):
    number %= 1 << 64
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes(encoded + bytes([number]))


def field(number, payload):
    return varint(number * 8 + 2) + varint(len(payload)) + payload


def entry(name, shape, dtype, content):
    tensor = b"".join(varint(8) + varint(size) for size in shape) + field(2, dtype) + field(3, content)
    return field(1, field(1, name) + field(2, tensor))


def sealed(content):
    """With the checksum that belongs to it: it tells damage, not who made the file."""
    return content + checkpoint.DIGEST_HEADER + hashlib.sha256(content).digest()


# ------------------------------------------------------------------------------------------------- the cases


def damaged(content, count, generator):
    """``count`` / 4 cuts and ``count`` flipped bits, half of them in the first 2,000 bytes: (name, bytes)."""
    for index in range(max(1, count // 4)):
        length = generator.randrange(len(content)) if index else 0
        yield f"cut to {length}", content[:length]
    for index in range(count):
        place = generator.randrange(min(2000, len(content)) if index % 2 else len(content))
        broken = bytearray(content)
        broken[place] ^= 1 << generator.randrange(8)
        yield f"bit of byte {place} flipped", bytes(broken)


def hostile_entries(good):
    """Checkpoints whose checksum is right and whose structure is false: (name, content before the checksum)."""
    weight = b"head.bias"
    ones = np.ones(2, np.float32).tobytes()
    for shape in ([1 << 40], [-1], [1 << 62, 4], [(1 << 63) - 1], [0], [3], [1, 1, 2], [2**32 + 2], [2] * 70, [-2, -1]):
        yield f"shape {shape[:3]}", good + entry(weight + b"2", shape, b"Float32", ones)
    for dtype in (b"", b"Float64", b"BFloat16", b"str", b"object", b"Bool", b"\xff", b"Int4", b"__class__", b"O"):
        yield f"type {dtype}", good + entry(weight + b"2", [2], dtype, ones)
    yield "a second entry of a name", good + entry(weight, [2], b"Float32", ones)
    yield "no name", good + field(1, field(2, field(2, b"Float32")))
    yield "a number for the tensor", good + field(1, field(1, b"x") + varint(16) + varint(7))
    yield "no tensor", good + field(1, field(1, b"x"))
    yield "name that is no text", good + entry(b"\xff\xfe", [2], b"Float32", ones)
    yield "name that is a path", good + entry(b"../../etc/passwd", [2], b"Float32", ones)
    yield "a group", good + bytes([11]) + bytes(64)
    yield "endless number", good + b"\x0a" + b"\xff" * 64
    yield "length beyond the end", good + b"\x0a" + varint(1 << 50)
    yield "a map parameter", good + field(1, field(1, b"x") + field(3, field(1, ones)))
    yield "nested a thousand times", good + nested(1000)
    yield "thousands of empty entries", good + field(1, b"") * 5000
    yield "thousands of names", good + b"".join(entry(b"n%d" % i, [1], b"UInt8", b"1") for i in range(20_000))


def nested(depth):
    inner = b""
    for _ in range(depth):
        inner = field(1, inner)
    return inner


def hostile_metas(meta):
    """What stands in the entry ``skipvit.meta``: (name, bytes)."""
    text = json.dumps(meta)
    yield "not JSON", b"{"
    yield "not text", b"\xff\xfe\x00"
    yield "empty", b""
    yield "nested", b"[" * 100_000
    yield "a number of 100,000 digits", b'{"format": ' + b"9" * 100_000 + b"}"
    yield "pickle", b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR."
    yield "YAML tag", b"!!python/object/apply:os.system ['true']"
    for value in (None, 7, "x", [], {}):
        yield f"is {value!r}", json.dumps(value).encode()
    for key, values in {
        "format": (None, 2, -1, "1", [1], {}, 1e300),
        "classes": (None, 7, "crow", {"crow": 1}, [1, 2], [None], [["crow"]], [{}]),
        "config": (None, 7, "x", [], {}, {"model": 7}, {"skip": "x"}, {"from_the_future": 1}),
        "step": ("7", None, [1], {}),
        "best_top1": ("x", [1]),
        "ranks": ("two", None),
    }.items():
        for value in values:
            yield f"{key} {value!r}", json.dumps({**meta, key: value}).encode()
    for key, values in {
        "model.embed_dim": (10**9, 2**31 - 1, 2**62, -1, 0, 17, "16", 1e9, None, [16], True, float("nan")),
        "model.depth": (10**9, 0, 10**6, 3),
        "model.num_heads": (10**9, 3, 0),
        "model.image_size": (10**6, 1 << 30, 32, 0),
        "model.patch_size": (10**6, 1, 16, 0),
        "model.num_classes": (10**9, None, 3, 1, 0),
        "model.mlp_ratio": (1e9, 1e-9, 1e300, float("inf")),
        "model.name": ("os.system", "../vit", "", None, "vit_base_patch16_224"),
        "model.dropout": (1.0, -1, float("nan")),
        "skip": ([{"start": 1, "end": 2}] * 1000, 7, [None], {"start": 0, "end": 10**9}, {"score": "mask"}),
        "phases": ([{"share": 1e-9}] * 100, [{"share": 1, "image_size": 10**6}], 7),
        "data.batch_size": (10**9, 2**31 - 1),
        "data.num_workers": (10**9,),
        "data.train": ("/etc/shadow", "\0", "x" * 10_000),
        "data.mean": ([float("nan")] * 3, [1e308] * 3, [], [0] * 1000),
        "data.std": ([0, 0, 0], [1e-320] * 3),
        "data.val_crop_ratio": (1e-9, 1e-300),
        "train.output": ("/etc/skipvit", "../../escaped"),
        "train.epochs": (10**9, 2**62),
        "train.seed": (-1, 2**40),
    }.items():
        for value in values:
            changed = json.loads(text)
            section, _, name = key.partition(".")
            if name:
                changed["config"][section][name] = value
            else:
                changed["config"][section] = value
            yield f"{key} {str(value)[:40]}", json.dumps(changed).encode()


def hostile_weights(arrays):
    """Weights that no training gave: (name, arrays)."""
    some = next(name for name in arrays if name.endswith("qkv.weight"))
    for name, value in {
        "NaN": np.full_like(arrays[some], np.nan),
        "infinity": np.full_like(arrays[some], np.inf),
        "whole numbers": arrays[some].astype(np.int32),
        "bytes": arrays[some].astype(np.uint8),
        "transposed": np.ascontiguousarray(arrays[some].T),
        "no number": np.zeros((0,), np.float32),
        "half precision": arrays[some].astype(np.float16),
        "a vector of as many": arrays[some].reshape(-1),
    }.items():
        yield name, {**arrays, some: value}
        yield f"average of {name}", {**arrays, f"ema.{some}": value}
    yield "one is missing", {name: value for name, value in arrays.items() if name != some}


NAMES = {np.dtype(np.float32): b"Float32", np.dtype(np.float16): b"Float16", np.dtype(np.int32): b"Int32"}
NAMES[np.dtype(np.uint8)] = b"UInt8"


def entries_of(arrays):
    return b"".join(
        entry(name.encode(), array.shape, NAMES[array.dtype], array.tobytes()) for name, array in arrays.items()
    )


def meta_entry(encoded):
    return entry(checkpoint.META.encode(), [len(encoded)], b"UInt8", encoded)


def write_cases(work, count):
    """The files, and what to do with each: (kind, file, what it is)."""
    generator = random.Random(7)
    work.mkdir(parents=True, exist_ok=True)
    runs.write_checkpoint(work / "good.ckpt", CLASSES)
    good = checkpoint.load(work / "good.ckpt")
    whole = (work / "good.ckpt").read_bytes()
    before = whole[: -checkpoint.DIGEST_ENTRY_BYTES]
    arrays = {name: np.asarray(value) for name, value in good.arrays.items()}
    weights = write_safetensors(work / "vit_tiny.safetensors")
    cases = []

    def add(kind, contents, suffix=".ckpt"):
        for name, content in contents:
            path = work / f"vit_{len(cases)}{suffix}"
            path.write_bytes(content)
            cases.append((kind, path.name, name))

    def thinned(cases_of_a_kind):
        """All of them, or some where few were asked for."""
        listed = list(cases_of_a_kind)
        return listed if count >= 200 else generator.sample(listed, min(len(listed), count))

    add("checkpoint, damaged", damaged(whole, count, generator))
    # What is flipped and sealed again is another file, whose numbers are its maker's affair: no crash is asked for.
    flips = [item for item in damaged(before, count, generator) if "flipped" in item[0]]
    add("checkpoint, damaged and sealed again", ((name, sealed(content)) for name, content in flips))
    add("checkpoint, false entries", thinned((name, sealed(content)) for name, content in hostile_entries(before)))
    metas = [(name, sealed(entries_of(arrays) + meta_entry(text))) for name, text in hostile_metas(good.meta)]
    add("checkpoint, hostile configuration", thinned(metas))
    text = json.dumps(good.meta).encode()
    spoilt = [(name, sealed(entries_of(held) + meta_entry(text))) for name, held in hostile_weights(arrays)]
    add("checkpoint, spoilt weights", thinned(spoilt))
    # Longer than any disk here, and empty: nothing of it may be read.
    for name in ("sparse.ckpt", "sparse.safetensors"):
        with open(work / name, "wb") as file:
            file.truncate(1 << 40)
            if name.endswith(".ckpt"):
                file.seek((1 << 40) - checkpoint.DIGEST_ENTRY_BYTES)
                file.write(sealed(b""))
        cases.append(("a file of a terabyte", name, name))
    add("safetensors, damaged, its checksum given", damaged(weights, count, generator), ".safetensors")
    header = 8 + int.from_bytes(weights[:8], "little")
    in_header = ((name, broken + weights[header:]) for name, broken in damaged(weights[:header], count, generator))
    add("safetensors, header damaged", in_header, ".safetensors")
    add("safetensors, hostile", hostile_safetensors(weights), ".safetensors")
    (work / "cases.json").write_text(json.dumps(cases))
    return cases


def write_safetensors(path):
    """timm's tensors of a vit_tiny of one block for images of 32 pixels; the file's bytes."""
    model = config.model_config("vit_tiny_patch16_224", image_size=32, depth=1, num_classes=2)
    arrays = {item.name: item.asnumpy() for item in VisionTransformer(model, ()).get_parameters()}
    arrays["patch_embed.proj.weight"] = arrays["patch_embed.proj.weight"].reshape(192, 3, 16, 16)
    safetensors.numpy.save_file(arrays, str(path))
    return path.read_bytes()


def hostile_safetensors(good):
    """Headers that the format allows or should refuse: (name, bytes)."""
    size = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]

    def packed(changed, content=data):
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + content

    yield "header of 2^62 bytes", (1 << 62).to_bytes(8, "little") + good[8:]
    yield "header of 200 MB that is not there", (200 << 20).to_bytes(8, "little") + good[8:]
    yield "nested header", packed(b"[" * 100_000)
    yield "no tensors", packed({}, b"")
    yield "list", packed([1, 2])
    position = {"dtype": "F32", "shape": [1, 0, 192], "data_offsets": [0, 0]}
    for name, change in {
        "pos_embed of no places": {"pos_embed": position},
        "pos_embed a scalar": {"pos_embed": {**position, "shape": []}},
        "shape of 2^60": {"pos_embed": {**header["pos_embed"], "shape": [1 << 60]}},
        "shape that overflows": {"pos_embed": {**header["pos_embed"], "shape": [1 << 32, 1 << 32, 1 << 32]}},
        "offsets backwards": {"pos_embed": {**header["pos_embed"], "data_offsets": [10, 0]}},
        "offsets beyond": {"pos_embed": {**header["pos_embed"], "data_offsets": [0, 1 << 50]}},
        "offsets of another": {"cls_token": header["pos_embed"]},
        "metadata of a path": {"__metadata__": {"base": "../../etc/passwd"}},
    }.items():
        yield name, packed({**header, **change})
    for shape in ([], [0], [2**31], [1, 1], [0, 192]):
        small = {"pos_embed": [1, 5, 192], "cls_token": [1, 1, 192], "patch_embed.proj.weight": [192, 3, 16, 16]}
        yield f"head of {shape}", of_zeros({**small, "head.weight": shape} if np.prod(shape) < 1e6 else small)
    for patches in ([192, 3, 0, 0], [192, 0, 16, 16], [0, 3, 16, 16], [192, 3, 16, 8], [192]):
        yield (
            f"patches of {patches}",
            of_zeros({"pos_embed": [1, 5, 192], "cls_token": [1, 1, 192], "patch_embed.proj.weight": patches}),
        )
    for positions in ([1, 1, 192], [1, 0, 192], [1, 2, 0], [1, 4, 192], [1, 3, 192]):
        yield (
            f"positions of {positions}",
            of_zeros(
                {
                    "pos_embed": positions,
                    "cls_token": [1, 1, 192],
                    "patch_embed.proj.weight": [192, 3, 16, 16],
                    "head.weight": [2, 192],
                }
            ),
        )
    for name in ("blocks.", "blocks.x.y", "blocks.9999999999.w", "a" * 10_000, "\n", "\x00", "../x"):
        yield (
            f"tensor named {name[:20]!r}",
            of_zeros(
                {
                    "pos_embed": [1, 5, 192],
                    "cls_token": [1, 1, 192],
                    "patch_embed.proj.weight": [192, 3, 16, 16],
                    "head.weight": [2, 192],
                    name: [1],
                }
            ),
        )
    arrays = safetensors.numpy.load(good)
    yield "NaN", safetensors.numpy.save({**arrays, "head.bias": np.full(2, np.nan, np.float32)})


def of_zeros(shapes):
    return safetensors.numpy.save({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


# ------------------------------------------------------------------------------------------------- the child


def open_one(work, kind, name, image):
    """Open a file as the commands do: what came of it, in a word, and what was said."""
    said = io.StringIO()
    path, out = work / name, work / "out.ckpt"
    out.unlink(missing_ok=True)
    predicts = "hostile" in kind or "spoilt" in kind or "terabyte" in kind or "entries" in kind
    if path.suffix == ".safetensors":
        arguments = [str(path), str(out)]
        if "checksum given" in kind:
            arguments += ["--sha256", hashlib.sha256((work / "vit_tiny.safetensors").read_bytes()).hexdigest()]
        command = convert.main
    else:
        command = predict.main if predicts else load_only
        arguments = [str(path), str(image)] if predicts else [str(path)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = run_command(command, arguments)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    line = said.getvalue()
    if code:
        one_line = line.startswith("error: ") and line.count("\n") == 1
        return ("refused" if one_line and code in (1, 2) else "untidy"), line
    if line:
        return "untidy", line
    written = out if path.suffix == ".safetensors" else path
    reference = work / ("good_timm.ckpt" if path.suffix == ".safetensors" else "good.ckpt")
    return ("same" if served(written) == served(reference) else "other"), line


def load_only(arguments):
    checkpoint.build_model(checkpoint.load(Path(arguments[0])))


def served(path):
    """The bits of the weights, and what decides how they are used."""
    saved = checkpoint.load(path)
    net = checkpoint.build_model(saved)
    bits = {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    return bits, saved.config.model, saved.config.skip, saved.config.data.mean, saved.config.data.std


def child(work, first):
    """Open the cases from ``first`` on, a line each on standard output."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    image = next((work / "images").rglob("*.png"))
    run_command(convert.main, [str(work / "vit_tiny.safetensors"), str(work / "good_timm.ckpt")])
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, resource.RLIM_INFINITY))
    for index, (kind, name, _) in enumerate(json.loads((work / "cases.json").read_text())[first:], first):
        started = time.monotonic()
        outcome, said = open_one(work, kind, name, image)
        seconds = time.monotonic() - started
        print(
            json.dumps([index, outcome if seconds < SECONDS else "slow", said[:300]]), file=sys.__stdout__, flush=True
        )


# ------------------------------------------------------------------------------------------------- the parent

# What may come of a kind besides a refusal. A checksum that is right vouches for the numbers, not for a configuration.
ALLOWED = {
    "checkpoint, damaged": (),
    "checkpoint, damaged and sealed again": ("same", "other"),
    "checkpoint, false entries": ("same",),
    "checkpoint, hostile configuration": ("same", "other"),
    "checkpoint, spoilt weights": ("same", "other"),
    "a file of a terabyte": (),
    "safetensors, damaged, its checksum given": (),
    "safetensors, header damaged": ("same",),
    "safetensors, hostile": ("same",),
}


def run(work: Path, count: int) -> dict:
    """Try the files: ``count`` flipped bits and a quarter of it cuts of each kind, and what was made to harm."""
    cases = write_cases(work, count)
    runs.write_images(work / "images", 1)
    outcomes: dict[int, tuple[str, str]] = {}
    while len(outcomes) < len(cases):
        first = len(outcomes)
        command = [sys.executable, "-m", "reliability.files", str(work), str(first)]
        path = f"{runs.ROOT / 'src'}:{runs.ROOT / 'tests'}"
        ended = subprocess.run(
            command, cwd=work, env=runs.environment(PYTHONPATH=path), capture_output=True, encoding="utf-8", check=False
        )
        for line in ended.stdout.splitlines():
            if line.startswith("["):
                index, outcome, said = json.loads(line)
                outcomes[index] = (outcome, said)
        if len(outcomes) < len(cases):
            outcomes[len(outcomes)] = ("crash", f"exit {ended.returncode}: {ended.stderr[-300:]}")
    kinds: dict[str, dict] = {}
    lost = []
    for index, (kind, name, what) in enumerate(cases):
        outcome, said = outcomes[index]
        counts = kinds.setdefault(kind, {"tried": 0, "refused": 0, "accepted": 0, "lost": 0})
        counts["tried"] += 1
        if outcome == "refused" or outcome in ALLOWED[kind]:
            counts["refused" if outcome == "refused" else "accepted"] += 1
        else:
            counts["lost"] += 1
            lost.append(f"{kind}: {what}: {outcome}: {said.strip()} ({name})".replace(str(work), "."))
    return {"tried": len(cases), "survived": len(cases) - len(lost), "lost": len(lost), "cases": lost, "kinds": kinds}


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]))
