"""A checkpoint's model as one file for serving: MINDIR for MindSpore (Lite), or ONNX.

The graph takes normalised images (B, 3, S, S), float32, and gives logits (B, classes). What the pixels must be and what
the logits mean stands in a JSON file beside it, of the same name: size, crop, interpolation, mean, standard deviation
(of values from 0 to 1), class names. The file is loaded again and compared with the model on 100 random images before
it gets its name: MINDIR must differ by 0; ONNX, run by onnxruntime, by at most 1e-4 of the largest logit, but for up to
3 images where two scores are equal but for rounding, so that another patch is kept.

Export on the device that is to serve: the graph has the forms of operators that suit it.

The last line is JSON: the files, the largest difference found, and on how many images another patch was kept.

Example:
  python -m skipvit.export runs/clutter/best.ckpt model.mindir --batch-size 8 --precision fp16
  python -m skipvit.export runs/clutter/best.ckpt model.onnx    # needs pip install onnx onnxruntime
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from skipvit import checkpoint, runtime
from skipvit.config import UserError
from skipvit.data import shorter_side
from skipvit.inference import class_name, refuse_masks
from skipvit.kernels import plain_operators
from skipvit.log import Parser, RunFailed, run_command
from skipvit.model import VisionTransformer

COMPARED_IMAGES = 100
ONNX_TOLERANCE = 1e-4  # of the largest logit
MAX_CHOSEN_OTHERWISE = 0.03  # of the images


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command; see ``--help``."""
    parser = Parser(prog="python -m skipvit.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's last.ckpt or best.ckpt")
    parser.add_argument("output", metavar="OUT", type=Path, help="*.mindir or *.onnx")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="images a call (default 1)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of the matrix products (default fp32); fp16 for MINDIR only",
    )
    parser.add_argument("--no-skip", action="store_true", help="the same weights on all tokens in every block")
    arguments = parser.parse_args(argv)
    output = arguments.output
    if output.suffix not in (".mindir", ".onnx"):
        raise UserError(f"{output}: its name ends neither in .mindir nor in .onnx")
    if not output.parent.is_dir():
        raise UserError(f"{output}: {output.parent} is not a folder; make it first")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size: {arguments.batch_size} is below 1; give 1 or more")
    if output.suffix == ".onnx":
        if arguments.precision != "fp32":
            raise UserError("--precision fp16: ONNX is written and checked in fp32; leave it out, or take .mindir")
        import_onnx()

    runtime.start()
    saved = checkpoint.load(arguments.checkpoint)
    if not arguments.no_skip:
        refuse_masks(saved.config)
    with plain_operators():
        net = checkpoint.build_model(saved, not arguments.no_skip, runtime.compute_dtype(arguments.precision))
    net.set_train(False)
    images = random_images(arguments.batch_size, saved.config.model.image_size)
    export = export_mindir if output.suffix == ".mindir" else export_onnx
    # In a folder beside it, for what is half written or wrong must not get its name.
    target = output.absolute()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export.") as folder, working_in(folder):
            found = export(net, images, Path("model" + output.suffix))
            description = json.dumps(describe(saved, net, arguments), indent=1) + "\n"
            Path("model.json").write_text(description, encoding="utf-8")
            for suffix in (".json", output.suffix):
                os.chmod("model" + suffix, 0o644)
                os.replace("model" + suffix, target.with_suffix(suffix))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    closing = {"output": str(output), "description": str(output.with_suffix(".json"))}
    print(json.dumps({**closing, "compared_images": images.shape[0] * images.shape[1], **found}))


@contextlib.contextmanager
def working_in(folder: str) -> Iterator[None]:
    """With ``folder`` as the working directory: MindSpore's export takes no path with a blank or an umlaut."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def random_images(batch_size: int, image_size: int) -> np.ndarray:
    """``(batches, B, 3, S, S)`` to compare by, at least `COMPARED_IMAGES` of them."""
    shape = (-(-COMPARED_IMAGES // batch_size), batch_size, 3, image_size, image_size)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def export_mindir(net: VisionTransformer, images: np.ndarray, path: Path) -> dict[str, float]:
    """Write it and load it again.

    Returns:
        ``difference``: the largest of a logit from the model's.

    Raises:
        RunFailed: there is one.
    """
    ms.export(net, Tensor(images[0]), file_name=str(path), file_format="MINDIR")
    reloaded = nn.GraphCell(ms.load(str(path)))
    difference = max(
        float(np.abs(reloaded(Tensor(batch)).asnumpy() - net(Tensor(batch)).asnumpy()).max()) for batch in images
    )
    if difference != 0:
        raise RunFailed(f"not written: the MINDIR loaded again gives logits that differ by {difference:.2g}")
    return {"difference": difference}


class ErfStandIn(nn.Cell):
    """`ExactGelu` with another operator for erf, which MindSpore's ONNX exporter lacks; in the file it is renamed."""

    def __init__(self):
        super().__init__()
        self.stand_in = ops.Abs()

    def construct(self, u):
        """``(...)`` to ``(...)``."""
        return u * (self.stand_in(u) + 1.0)


def export_onnx(net: VisionTransformer, images: np.ndarray, path: Path) -> dict[str, float]:
    """Write it and run it by onnxruntime. Afterwards ``net`` is good for nothing else.

    Returns:
        See `compare`.

    Raises:
        RunFailed: the logits are others, or the exporter does not know an operator.
    """
    onnx, onnxruntime = import_onnx()
    expected = np.stack([net(Tensor(batch)).asnumpy() for batch in images])
    exact = [block for block in net.blocks if block.mlp.act.form == "exact"]
    for block in exact:
        block.mlp.act = ErfStandIn()
    try:
        runtime.export_onnx(net, Tensor(images[0]), str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(f"not written: MindSpore's ONNX exporter cannot ({reason}); take .mindir") from None
    model = onnx.load(str(path))
    standing_in = [node for node in model.graph.node if node.op_type == "Abs"]
    for node in standing_in:
        node.op_type = "Erf"
    output = model.graph.output[0]
    for node in model.graph.node:
        node.output[:] = ["logits" if name == output.name else name for name in node.output]
    output.name = "logits"
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    given = np.stack([session.run(["logits"], {name: batch})[0] for batch in images])
    if len(standing_in) != len(exact):
        raise RunFailed("not written: the ONNX graph has other operators than the model; take .mindir")
    return compare(given, expected, chooses=bool(net.span_bounds))


def compare(given: np.ndarray, expected: np.ndarray, chooses: bool) -> dict[str, float]:
    """Whether two graphs' logits ``(..., classes)`` are the same but for rounding.

    Where a model ``chooses`` tokens, rounding may decide between two of equal scores, and all logits of that image are
    others then; of a wrong graph most images' would be.

    Returns:
        ``difference``: the largest of a logit, and ``chosen_otherwise``: images left out of it, if any.

    Raises:
        RunFailed: too many images differ by more than `ONNX_TOLERANCE`.
    """
    differences = np.abs(given - expected).max(-1)
    same = differences <= ONNX_TOLERANCE * np.abs(expected).max()
    others = int((~same).sum())
    if others > (MAX_CHOSEN_OTHERWISE * same.size if chooses else 0) or not np.isfinite(given).all():
        raise RunFailed(
            f"not written: the ONNX graph's logits differ by {differences.max():.2g} from the model's; take .mindir"
        )
    return {"difference": float(differences[same].max()), **({"chosen_otherwise": others} if others else {})}


def import_onnx() -> tuple[Any, Any]:
    """The packages onnx and onnxruntime."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}; pip install onnx onnxruntime, or take .mindir") from None
    return onnx, onnxruntime


def describe(saved: checkpoint.Checkpoint, net: VisionTransformer, arguments: argparse.Namespace) -> dict[str, Any]:
    """What stands beside the graph."""
    model, data = saved.config.model, saved.config.data
    shape = [arguments.batch_size, 3, model.image_size, model.image_size]
    return {
        "model": model.name,
        "precision": arguments.precision,
        "blocks_that_tokens_skip": [list(range(start, end)) for start, end in net.span_bounds],
        "input": {"name": "images", "shape": shape, "type": "float32", "channels": "red, green, blue"},
        "preprocessing": {
            "resize_shorter_side_to": shorter_side(model.image_size, data.val_crop_ratio),
            "interpolation": data.interpolation,
            "crop_from_the_centre": model.image_size,
            "divide_by": 255,
            "then_subtract_mean": list(data.mean),
            "then_divide_by_std": list(data.std),
        },
        "output": {"name": "logits", "shape": [arguments.batch_size, model.num_classes], "type": "float32"},
        "classes": [class_name(saved.meta["classes"], index) for index in range(model.num_classes or 0)],
        **runtime.versions(),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
