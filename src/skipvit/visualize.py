"""Pictures of a checkpoint's choice of tokens, or of how runs went. As PNG, or as PDF or SVG for a paper.

For each image: what the model sees of it, the kept patches clear and the skipped ones faded, and the score that chose
them as a heat map (dark: the image's lowest; white: dropped by a span before); above it the predicted class and its
probability. From run folders instead: loss, Top-1, learning rate and images/s over the epochs.

Prints a line of JSON: the picture's path as "output", and for each image its choices: class, probability (0 to 1), and
the kept patches' indices, counted row by row from 0.

Example:
  python -m skipvit.visualize runs/clutter/best.ckpt photo.jpg photos/ -o tokens.png
  python -m skipvit.visualize photos/ --compare runs/a/best.ckpt runs/b/best.ckpt -o compared.pdf
  python -m skipvit.visualize runs/a/best.ckpt photos/ --compare cls_attention random -o scores.png
  python -m skipvit.visualize runs/a runs/b -o curves.png
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from skipvit import checkpoint, draw, runtime
from skipvit.config import SCORES, UserError
from skipvit.inference import Classify, list_images, views
from skipvit.log import METRICS, Parser, one_line, read_metrics, run_command

MOST_IMAGES = 64  # in one picture
BATCH_SIZE = 8


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command; see ``--help``."""
    parser = Parser(prog="python -m skipvit.visualize", description=__doc__)
    parser.add_argument(
        "paths",
        metavar="PATH",
        type=Path,
        nargs="+",
        help=f"CHECKPOINT IMAGE|FOLDER ... (at most {MOST_IMAGES} images), or RUN_FOLDER ...",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture: *.png, *.pdf or *.svg")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out, and name them")
    parser.add_argument("--spans", action="store_true", help="every span of blocks, not just the first")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help=f"side by side: two checkpoints, or two scores of the one checkpoint ({', '.join(SCORES)})",
    )
    arguments = parser.parse_args(argv)
    draw.check_output(arguments.output)
    paths: list[Path] = arguments.paths
    summary: dict[str, Any] = {"output": str(arguments.output)}
    if any((path / METRICS).is_file() for path in paths):
        figure = draw_runs(paths)
        summary["runs"] = [str(path) for path in paths]
    else:
        rows = choices(paths, arguments.compare, arguments.spans, arguments.skip_unreadable)
        for row in rows:
            if not row.views:
                print(f"left out, cannot be read: {one_line(row.name)}")
        rows = [row for row in rows if row.views]
        if not rows:
            raise UserError("none of the images can be read; give others")
        figure = draw.tokens(rows)
        summary["images"] = [describe(row) for row in rows]
    draw.write(figure, arguments.output)
    print(json.dumps(summary))


def draw_runs(folders: Sequence[Path]) -> Any:
    """The curves of runs."""
    for folder in folders:
        if not (folder / METRICS).is_file():
            raise UserError(f"{folder}: holds no {METRICS}, so it is no run's folder; give such folders only")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return draw.curves({name: read_metrics(folder) for name, folder in zip(names, folders)})


def choices(
    paths: Sequence[Path], compare: Optional[Sequence[str]], spans: bool, skip_unreadable: bool
) -> list[draw.Row]:
    """Each image with what was chosen of it: by the checkpoint, or by the two that are compared; or with nothing."""
    models: list[tuple[Path, Optional[str]]]
    if compare and not set(compare) & set(SCORES):
        models = [(Path(path), None) for path in compare]
    else:
        scores: Sequence[Optional[str]] = compare or [None]
        models, paths = [(paths[0], score) for score in scores], paths[1:]
    images = list_images(paths)
    if not 1 <= len(images) <= MOST_IMAGES:
        raise UserError(f"{len(images)} images given; give 1 to {MOST_IMAGES} after the checkpoint")
    runtime.start()
    named = compare is not None
    chosen = [chosen_by(path, score, images, spans, named, skip_unreadable) for path, score in models]
    return [
        draw.Row(str(image), [view for of_model in of_image for view in of_model])
        for image, *of_image in zip(images, *chosen)
    ]


def chosen_by(
    path: Path, score: Optional[str], images: Sequence[Path], spans: bool, named: bool, skip_unreadable: bool
) -> list[list[draw.View]]:
    """For each image the views of one checkpoint, with its own score or another."""
    saved = checkpoint.load(path)
    config = saved.config
    if score is not None:
        if score not in SCORES:
            raise UserError(f"--compare: {score} is no score; known are {', '.join(SCORES)}")
        config = config.replace(skip=tuple(replace(span, score=score) for span in config.skip))
    net = checkpoint.build_model(replace(saved, config=config))
    if not net.span_bounds:
        raise UserError(f"{path}: no token skips in its model, so there is no choice to show")
    batch_size = min(BATCH_SIZE, len(images))
    seen = views(Classify(net, config), config, saved.meta["classes"], images, batch_size, skip_unreadable)
    name = score or f"{path.parent.name}/{path.name}"
    titles = [", ".join([name] * named + [f"blocks {start} to {end - 1}"] * spans) for start, end in net.span_bounds][
        : None if spans else 1
    ]
    return [[view._replace(title=title) for view, title in zip(of_image, titles)] for of_image in seen]


def describe(row: draw.Row) -> dict[str, Any]:
    """An image's part of the JSON line."""
    return {
        "image": row.name,
        "choices": [
            {
                **({"of": view.title} if view.title else {}),
                "class": view.class_name,
                "probability": view.probability,
                "kept": view.kept.reshape(-1).nonzero()[0].tolist(),
            }
            for view in row.views
        ],
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
