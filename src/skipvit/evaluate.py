"""Top-1 and Top-5 of a checkpoint over an image folder, every image counted once.

Labels go by the class folders' names, which must be among the checkpoint's. With masks of the objects also the share of
the objects' patches that the first span kept, and what a random choice would keep.

The last line is JSON: top1, top5 (percent), images, images_per_second.

Example:
  python -m skipvit.evaluate runs/cifar10/best.ckpt --data cifar10/test
  python -m skipvit.evaluate runs/cifar10/best.ckpt --data cifar10/test --no-skip
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from skipvit import checkpoint, runtime
from skipvit.config import Config, UserError, given_spans, keeping
from skipvit.data import (
    EvalBatches,
    ImageFolder,
    check_masks,
    image_size,
    mask_path,
    object_patches,
    to_dataset,
    unreadable_file,
)
from skipvit.inference import Classify
from skipvit.log import Parser, RunFailed, one_line, run_command


@dataclass(frozen=True)
class Result:
    """What an evaluation found. Shares are of 1, top1 and top5 in percent."""

    top1: float
    top5: float
    images: int
    images_per_second: float
    unreadable: list[str]  # of all ranks: the files, an image's or its mask's
    object_kept: Optional[float] = None  # share of the object's patches that the first span kept, mean over images
    random_kept: Optional[float] = None  # what a random choice of as many patches keeps


def evaluate(
    classify: Classify,
    folder: ImageFolder,
    config: Config,
    *,
    batch_size: int,
    classes: Sequence[str],
    masks: Optional[Path] = None,
    rank: int = 0,
    ranks: int = 1,
    skip_unreadable: bool = False,
    after_each_batch: Callable[[], None] = lambda: None,
) -> Result:
    """Classify every image of ``folder``; all ranks together count each exactly once.

    Args:
        classify: the model.
        folder: images whose classes are among ``classes``.
        config: geometry of the images, and the model's spans.
        batch_size: a rank's; the last batch is padded and the padding not counted.
        classes: the model's, in the order of its logits.
        masks: folder with each image's object mask, for the share of the object that was kept, and for ``score: mask``.
        rank: this process.
        ranks: of so many.
        skip_unreadable: leave unreadable images out (they are named in the result) instead of raising.
        after_each_batch: called by all ranks alike; it may raise to end this.

    Raises:
        UserError: a class that the model does not know, or an unreadable image.
        RunFailed: the model gives no numbers.
    """
    unknown = sorted(set(folder.classes) - set(classes))
    if unknown:
        raise UserError(
            f"{folder.root}: class {unknown[0]} is none of the model's {len(classes)}: {', '.join(classes[:5])} …"
        )
    label_of = np.array([list(classes).index(name) for name in folder.classes])
    source = EvalBatches(
        folder,
        config,
        batch_size=batch_size,
        rank=rank,
        ranks=ranks,
        skip_unreadable=skip_unreadable,
        masks=masks,
    )
    top1 = top5 = images = 0
    kept_shares: list[float] = []
    kept_count = 0
    unreadable: list[int] = []
    started = time.perf_counter()
    for index, row in enumerate(to_dataset(source).create_tuple_iterator(num_epochs=1)):
        batch, labels, valid, *scores = row
        outputs = classify(batch, *scores)
        unreadable += source.check(index, labels.asnumpy())
        valid = valid.asnumpy().astype(bool)
        logits = outputs[0].asnumpy()[valid]
        if not np.isfinite(logits).all():  # sorting would make class 0 of it
            raise RunFailed(f"{folder.root}: the model's logits are not finite, its weights are spoilt")
        wanted = label_of[labels.asnumpy()[valid]]
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        top1 += int((best[:, 0] == wanted).sum())
        top5 += int((best == wanted[:, None]).any(1).sum())
        images += int(valid.sum())
        if masks is not None and len(outputs) > 1:
            kept = outputs[1].asnumpy()[valid]
            kept_count = kept.shape[1]
            for sample, places in zip(source.samples(index)[valid], kept):
                size = image_size(folder.path(sample))
                covered = object_patches(mask_path(masks, folder.names[sample]), size, config)
                if covered.sum() > 0:
                    kept_shares.append(float(covered[places].sum() / covered.sum()))
        after_each_batch()
    seconds = time.perf_counter() - started
    counts = runtime.sum_over_ranks(np.array([top1, top5, images, sum(kept_shares), len(kept_shares)]), ranks)
    top1, top5, images, kept_sum, with_object = counts
    left_out = runtime.union_over_ranks(np.array(unreadable, np.int64), len(folder), ranks)
    if images == 0:
        raise UserError(f"{folder.root}: none of its images can be read")
    return Result(
        top1=round(100.0 * top1 / images, 4),
        top5=round(100.0 * top5 / images, 4),
        images=int(images),
        images_per_second=round(images / seconds, 1),
        unreadable=[str(unreadable_file(folder, int(sample), source.masks)) for sample in left_out],
        object_kept=round(kept_sum / with_object, 4) if with_object else None,
        random_kept=round(kept_count / config.model.num_patches, 4) if with_object else None,
    )


def summary(result: Result) -> dict[str, Any]:
    """The result as the JSON line has it: what was not measured is left out."""
    plain = asdict(result)
    plain["unreadable"] = len(result.unreadable)
    return {key: value for key, value in plain.items() if value is not None and (value or key != "unreadable")}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command; see ``--help``."""
    parser = Parser(prog="python -m skipvit.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's last.ckpt or best.ckpt")
    parser.add_argument("--data", type=Path, required=True, help="folder of <class>/<image>")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--no-skip", action="store_true", help="the same weights on all tokens in every block")
    choice.add_argument("--keep-ratio", type=float, metavar="R", help="the same weights with another share kept")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default 64)")
    parser.add_argument("--masks", type=Path, help="folder parallel to --data with object masks, as clutter has")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out, and name them")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size: {arguments.batch_size} is below 1; give 1 or more")
    if arguments.masks is not None and not arguments.masks.is_dir():
        raise UserError(f"--masks: {arguments.masks} is not a folder; leave it out where there are no masks")
    if arguments.keep_ratio is not None and not 0 < arguments.keep_ratio <= 1:
        raise UserError(f"--keep-ratio: {arguments.keep_ratio} is outside (0, 1]; 1 keeps every token")

    runtime.start()
    saved = checkpoint.load(arguments.checkpoint)
    folder = ImageFolder(arguments.data, "--data")
    config = saved.config
    if arguments.no_skip:
        config = config.replace(skip=())
    elif arguments.keep_ratio is not None:
        if not config.skip:
            raise UserError("--keep-ratio: no token skips in this checkpoint's model; leave it out")
        config = config.replace(skip=keeping(config.skip, arguments.keep_ratio))
    if arguments.masks is not None or any(span.score == "mask" for span in given_spans(config)):
        check_masks(arguments.masks, folder, "--masks")
    result = evaluate(
        Classify(checkpoint.build_model(replace(saved, config=config)), config),
        folder,
        config,
        batch_size=min(arguments.batch_size, len(folder)),
        classes=saved.meta["classes"],
        masks=arguments.masks,
        skip_unreadable=arguments.skip_unreadable,
    )
    for path in result.unreadable:
        print(f"left out, cannot be read: {one_line(path)}")
    print(f"Top-1 {result.top1:.2f}%  Top-5 {result.top5:.2f}%  of {result.images} images in {folder.root}")
    print(json.dumps(summary(result)))


if __name__ == "__main__":
    sys.exit(run_command(main))
