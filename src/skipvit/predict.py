"""The classes that a checkpoint sees in images, with probabilities.

Prints a table, a line an image, then a line of JSON for each image: its path as "image", and as "predictions" the
most probable classes, each with its name and a probability from 0 to 1. With --skip-unreadable an image that cannot be
read has an "error" instead, which says why.

Example:
  python -m skipvit.predict runs/clutter/best.ckpt photo.jpg more_photos/
  python -m skipvit.predict runs/clutter/best.ckpt more_photos/ --json --top 1 > predictions.jsonl
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from skipvit import checkpoint, runtime
from skipvit.config import UserError
from skipvit.data import UnreadableImage
from skipvit.inference import Classify, Seen, class_name, list_images, look
from skipvit.log import Parser, one_line, run_command


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command; see ``--help``."""
    parser = Parser(prog="python -m skipvit.predict", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's last.ckpt or best.ckpt")
    parser.add_argument("paths", metavar="IMAGE|FOLDER", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes an image (default 5)")
    parser.add_argument("--json", action="store_true", help="the lines of JSON only, no table")
    parser.add_argument("--no-skip", action="store_true", help="the same weights on all tokens in every block")
    parser.add_argument("--skip-unreadable", action="store_true", help="go on past images that cannot be read")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at once (default 16)")
    arguments = parser.parse_args(argv)
    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is below 1; give 1 or more")
    paths = list_images(arguments.paths)

    runtime.start()
    saved = checkpoint.load(arguments.checkpoint)
    if arguments.no_skip:
        saved = replace(saved, config=saved.config.replace(skip=()))
    classify = Classify(checkpoint.build_model(saved), saved.config)
    batch_size = min(arguments.batch_size, len(paths))
    looked = look(classify, saved.config, paths, batch_size, arguments.skip_unreadable)
    records = [record(path, seen, saved.meta["classes"], arguments.top) for path, seen in zip(paths, looked)]
    if not arguments.json:
        print(table(records))
    for line in records:
        print(json.dumps(line))


def record(path: Path, seen: Union[Seen, UnreadableImage], classes: Sequence[str], top: int) -> dict[str, Any]:
    """An image's line for programs."""
    if isinstance(seen, UnreadableImage):
        return {"image": str(path), "error": seen.reason}
    best = np.argsort(-seen.probabilities, kind="stable")[:top]
    return {
        "image": str(path),
        "predictions": [
            {"class": class_name(classes, int(index)), "probability": round(float(seen.probabilities[index]), 6)}
            for index in best
        ],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The lines for people: image, then classes with percentages, in columns."""
    cells = [
        [
            one_line(line["image"]),
            *(f"{one_line(item['class'])} {100 * item['probability']:.1f}%" for item in line.get("predictions", ())),
            *(f"cannot be read: {one_line(line['error'])}" for _ in range("error" in line)),
        ]
        for line in records
    ]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


if __name__ == "__main__":
    sys.exit(run_command(main))
