"""A model at work on images: what evaluation, prediction, pictures and export have in common."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
from mindspore import Tensor, nn

from skipvit import draw
from skipvit.config import Config, UserError, given_spans
from skipvit.data import UnreadableImage, evaluation_image, images_in, open_image, shorter_side
from skipvit.log import RunFailed
from skipvit.model import VisionTransformer
from skipvit.step import Normalize

SHOWN_SIDE = 224  # pixels that an image has in a picture, however few the model sees; fewer where the file has fewer


class Classify(nn.Cell):
    """Bytes to logits, and what each span that skips chose."""

    def __init__(self, net: VisionTransformer, config: Config):
        super().__init__(auto_prefix=False)
        self.net, self.normalize = net, Normalize(config.data.mean, config.data.std)

    def construct(self, images, scores=None):
        """``(B, 3, S, S)`` uint8 to logits ``(B, C)``; for each span patch indices ``(B, K)``; and for each span again
        scores ``(B, L)`` and the patches that they are of ``(B, L)``.

        ``scores`` ``(G, B, N)`` are those of the spans that are given theirs.
        """
        results = self.net.run(self.normalize(images), scores=scores)
        return (self.net.classify(results[0]),) + results[2:]  # noqa: RUF005 - MindSpore 2.0.0 parses no starred tuple


class Seen(NamedTuple):
    """What the model made of an image.

    Attributes:
        probabilities: float64 ``(C,)``.
        kept: for each span that skips, bool ``(N,)``.
        scores: for each span that skips, float32 ``(N,)``; NaN for a patch that an earlier span had dropped.
    """

    probabilities: np.ndarray
    kept: list[np.ndarray]
    scores: list[np.ndarray]


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Images as they are, folders as the images below them.

    Raises:
        UserError: one does not exist, or is a folder without images.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            images += images_in(path)
        elif path.is_file():  # a pipe or a device might never end
            images.append(path)
        else:
            raise UserError(f"{path}: no such file; give an image or a folder of images")
    return images


def refuse_masks(config: Config) -> None:
    """Where there is nothing but images, a model that chooses by masks cannot work.

    Raises:
        UserError: one of the spans does.
    """
    if any(span.score == "mask" for span in given_spans(config)):
        raise UserError(
            "the model chooses patches by masks, which come with a data set alone; "
            "use skipvit.evaluate, or predict and export with --no-skip"
        )


def look(
    classify: Classify, config: Config, paths: Sequence[Path], batch_size: int, skip_unreadable: bool = False
) -> Iterator[Union[Seen, UnreadableImage]]:
    """Run the model over images, in order.

    Args:
        classify: the model.
        config: its configuration: the images' geometry.
        paths: of the images.
        batch_size: images at once; the last batch is padded, so that there is one graph.
        skip_unreadable: give what is wrong with an image in its place, instead of raising.

    Raises:
        UserError: an image cannot be read, or the model needs masks.
        RunFailed: the model gives no numbers.
    """
    refuse_masks(config)
    size, N = config.model.image_size, config.model.num_patches

    def read(path: Path) -> Union[np.ndarray, UnreadableImage]:
        try:
            return evaluation_image(open_image(path), config)
        except UnreadableImage as error:
            if skip_unreadable:
                return error
            raise UserError(str(error)) from None

    with ThreadPoolExecutor(config.data.num_workers) as threads:
        for first in range(0, len(paths), batch_size):
            chosen = paths[first : first + batch_size]
            images = np.zeros((batch_size, 3, size, size), np.uint8)
            read_ones = list(threads.map(read, chosen))
            for image, pixels in zip(images, read_ones):
                image[...] = 0 if isinstance(pixels, UnreadableImage) else pixels
            logits, *choices = (output.asnumpy() for output in classify(Tensor(images)))
            spans = len(choices) // 3
            for index, pixels in enumerate(read_ones):
                if isinstance(pixels, UnreadableImage):
                    yield pixels
                    continue
                if not np.isfinite(logits[index]).all():
                    raise RunFailed(f"{chosen[index]}: the model's logits are not finite, its weights are spoilt")
                kept = [_spread(places[index], True, np.zeros(N, bool)) for places in choices[:spans]]
                scores = [
                    _spread(places[index], score[index], np.full(N, np.nan, np.float32))
                    for score, places in zip(choices[spans::2], choices[spans + 1 :: 2])
                ]
                yield Seen(softmax(logits[index]), kept, scores)


def softmax(logits: np.ndarray) -> np.ndarray:
    """``(C,)`` to probabilities, in float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return exponentials / exponentials.sum()


def class_name(classes: Sequence[str], index: int) -> str:
    """The class of a logit; its number where the model has more of them than training had folders."""
    return classes[index] if index < len(classes) else str(index)


def views(
    classify: Classify,
    config: Config,
    classes: Sequence[str],
    paths: Sequence[Path],
    batch_size: int,
    skip_unreadable: bool = False,
) -> list[list[draw.View]]:
    """For each image, how each span that skips chose: what `draw.tokens` draws.

    Args:
        classify: the model.
        config: the model's configuration.
        classes: their names.
        paths: of the images.
        batch_size: images at once.
        skip_unreadable: have nothing for an image that cannot be read, instead of raising.
    """
    grid = config.model.image_size // config.model.patch_size
    shown: list[list[draw.View]] = []
    for path, seen in zip(paths, look(classify, config, paths, batch_size, skip_unreadable)):
        if isinstance(seen, UnreadableImage):
            shown.append([])
            continue
        best = int(seen.probabilities.argmax())
        name, probability = class_name(classes, best), round(float(seen.probabilities[best]), 6)
        image = displayed(path, config)
        shown.append(
            [
                draw.View("", name, probability, image, kept.reshape(grid, grid), score.reshape(grid, grid))
                for kept, score in zip(seen.kept, seen.scores)
            ]
        )
    return shown


def displayed(path: Path, config: Config) -> np.ndarray:
    """What the model sees of an image, as sharp as the file has it: uint8 ``(S', S', 3)``, S' a multiple of S."""
    size = config.model.image_size
    try:
        image = open_image(path)
    except UnreadableImage as error:
        raise UserError(str(error)) from None
    pixels_there = min(image.size) // shorter_side(size, config.data.val_crop_ratio)
    times = max(1, min(-(-SHOWN_SIDE // size), pixels_there))
    larger = config.replace(model=replace(config.model, image_size=times * size))
    return evaluation_image(image, larger).transpose(1, 2, 0)


def _spread(places: np.ndarray, values, background: np.ndarray) -> np.ndarray:
    background[places] = values
    return background
