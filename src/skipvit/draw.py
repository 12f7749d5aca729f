"""Pictures: which tokens went on, and how runs went; as PNG, or as PDF or SVG for a paper.

Plain matplotlib figures, made without its global state. It is imported when the first picture is drawn, so that what
draws nothing neither waits for it nor needs it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from skipvit.config import UserError
from skipvit.log import one_line, whole

SUFFIXES = (".png", ".pdf", ".svg")
DIMMED = 0.8  # share of white in what skipped
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called `$`
}
# For Chinese, Japanese and Korean names; the first of these that the machine has.
CJK_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei")
PANELS = {  # key in metrics.jsonl: title
    "loss": "training loss",
    "top1": "Top-1, %",
    "learning_rate": "learning rate",
    "images_per_second": "images/s",
}
SMOOTHED_FROM = 100  # points; from here on the loss is drawn faintly, and over it the mean over a fiftieth of them


class View(NamedTuple):
    """One choice of an image's tokens.

    Attributes:
        title: what was compared; empty where there is one choice only.
        class_name: the class that the model gave.
        probability: of this class, 0 to 1.
        image: uint8 ``(height, width, 3)``, what the model saw of it, in any resolution.
        kept: bool ``(g, g)``, the patches that went on.
        score: float ``(g, g)``, NaN for patches that were no candidates.
    """

    title: str
    class_name: str
    probability: float
    image: np.ndarray
    kept: np.ndarray
    score: np.ndarray

    @property
    def prediction(self) -> str:
        """In words, as many as stand over a panel."""
        return f"{_shortened(self.class_name, 18)} {100 * self.probability:.0f}%"


class Row(NamedTuple):
    """An image and the choices to show of it; ``name`` is where it came from."""

    name: str
    views: Sequence[View]


def check_output(path: Path) -> None:
    """Refuse a picture that could not be written, before the work is done.

    Raises:
        UserError: an unknown suffix, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a picture's name ends in one of {' '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: {path.parent} is not a folder; make it first")


def write(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's suffix: complete under its name, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    check_output(path)
    try:
        with _style(), whole(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def tokens(rows: Sequence[Row]) -> Any:
    """A grid, a row an image: the image, then of each choice the kept patches clear, and the score as a heat map.

    The heat map runs from the image's lowest score (dark) to its highest (light), by the square root, since a few
    patches often have most of the attention. Images with one choice stand two in
    a row where there are more than four.

    Returns:
        A matplotlib figure.
    """
    views = len(rows[0].views)
    width = 1 + 2 * views  # panels an image
    across = 2 if len(rows) > 4 and views == 1 else 1
    down = math.ceil(len(rows) / across)
    # Between the halves an empty panel of a tenth's width.
    widths = [*[1.0] * width, *[0.1, *[1.0] * width] * (across - 1)]
    inches = (1.5 * sum(widths), 1.7 * down + 0.1)
    with _style():
        figure, axes = _figure(down, len(widths), inches, width_ratios=widths)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.05, wspace=0, hspace=0)
        for axis in axes.flat:
            axis.set_axis_off()
        for index, row in enumerate(rows):
            line, column = index % down, index // down * (width + 1)
            _draw_row(axes[line, column : column + width], row, heading=line == 0)
    return figure


def _draw_row(axes: Any, row: Row, heading: bool) -> None:
    named = any(view.title for view in row.views)
    axes[0].imshow(row.views[0].image)
    path = Path(row.name)
    name = path.parent.name if path.stem.isdigit() else path.stem  # a number says less than the class's folder
    axes[0].set_title(_shortened(name, 18) if named else row.views[0].prediction)
    for view, clear, heat in zip(row.views, axes[1::2], axes[2::2]):
        height, width, _ = view.image.shape
        clear.imshow(dimmed(view.image, view.kept))
        _outline(clear, view.kept, height / len(view.kept))
        shade = np.sqrt(view.score - np.nanmin(view.score))
        heat.imshow(shade, cmap="inferno", interpolation="nearest", extent=(0, width, height, 0))
        kept = f"{view.kept.sum()} of {view.kept.size} kept"
        if heading:
            heat.set_title("score")
        if not named:
            clear.set_title(kept * heading)
            continue
        clear.set_title("\n" * heading + view.prediction)
        if heading:  # on the upper line, over both panels; as a title it would widen its own
            text, above = f"{_shortened(view.title, 24)}: {kept}", (0, 17)
            label = clear.annotate(text, (0, 1), above, "axes fraction", "offset points", fontweight="bold")
            label.set_in_layout(False)


def dimmed(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image with the patches that are not kept faded towards white: uint8 ``(H, W, 3)``, kept ``(g, g)`` bool."""
    height, width, _ = image.shape
    mask = Image.fromarray(kept).convert("L").resize((width, height), Image.Resampling.NEAREST)
    faded = np.rint(image * (1 - DIMMED) + 255 * DIMMED).astype(np.uint8)
    return np.where(np.asarray(mask)[:, :, None] > 0, image, faded)


def _outline(axis: Any, kept: np.ndarray, side: float) -> None:
    """A line between kept and faded, which on white would look alike; ``side``: of a patch, in pixels."""
    options = {"color": "black", "linewidth": 0.4}
    rows, columns = np.nonzero(kept[1:] != kept[:-1])
    axis.hlines((rows + 1) * side - 0.5, columns * side - 0.5, (columns + 1) * side - 0.5, **options)
    rows, columns = np.nonzero(kept[:, 1:] != kept[:, :-1])
    axis.vlines((columns + 1) * side - 0.5, rows * side - 0.5, (rows + 1) * side - 0.5, **options)


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Loss, Top-1, learning rate and images/s of one or more runs, over epochs where each run has validated once.

    Args:
        runs: each run's name and the records of its ``metrics.jsonl``.

    Returns:
        A matplotlib figure.
    """
    steps_per_epoch = [_steps_per_epoch(records) for records in runs.values()]
    in_epochs = all(steps_per_epoch)
    with _style():
        figure, axes = _figure(2, 2, (7.0, 4.2), sharex=True)
        for axis, (key, title) in zip(axes.flat, PANELS.items()):
            for index, records in enumerate(runs.values()):
                scale = steps_per_epoch[index] if in_epochs else 1.0
                # A validation has a speed of its own, which is not training's.
                of_kind = [record for record in records if ("loss" in record) == (key != "top1")]
                points = [(record["step"] / scale, record[key]) for record in of_kind if record.get(key) is not None]
                if key == "images_per_second":  # nor has a first step one, which compiles: 0 is noted for it
                    points = [point for point in points if point[1] > 0]
                if points:
                    _draw_curve(axis, np.array(points, float), f"C{index}", key)
            axis.set_title(title, loc="left")
        axes[0, 0].set_xlim(left=0)
        axes[1, 1].set_ylim(bottom=0)
        figure.supxlabel("epoch" if in_epochs else "step", fontsize=STYLE["font.size"])
        if len(runs) > 1:
            lines = [axes.flat[0].plot([], [], color=f"C{index}")[0] for index in range(len(runs))]
            figure.legend(lines, list(runs), loc="outside upper center", ncols=min(3, len(runs)))
    return figure


def _draw_curve(axis: Any, points: np.ndarray, colour: str, key: str) -> None:
    x, y = points.T
    if key == "loss" and len(points) >= SMOOTHED_FROM:
        axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.6)
        width = len(points) // 50
        y = np.convolve(y, np.full(width, 1 / width), "valid")
        x = x[(width - 1) // 2 :][: len(y)]
    marker = "o" if len(points) < 20 else ""  # a line of one point would not be seen
    axis.plot(x, y, color=colour, marker=marker, markersize=3)


def _steps_per_epoch(records: Sequence[Mapping[str, Any]]) -> float:
    """From a validation, which notes the epochs up to its step; 0 where there is none."""
    return next((record["step"] / record["epoch"] for record in records if "top1" in record and record["epoch"]), 0.0)


def speed_ups(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Measured speed-up over the bound by arithmetic, a point a setting.

    Args:
        rows: each with ``keep_ratio``, ``bound`` and ``speed_up``.

    Returns:
        A matplotlib figure.
    """
    with _style():
        figure, ((axis,),) = _figure(1, 1, (3.6, 3.0))
        for keep in sorted({row["keep_ratio"] for row in rows}):
            chosen = [row for row in rows if row["keep_ratio"] == keep]
            bounds, measured = ([row[key] for row in chosen] for key in ("bound", "speed_up"))
            axis.plot(bounds, measured, "o", markersize=4, label=f"{100 * keep:g}% of the patches kept")
        ends = [1.0, max(row["bound"] for row in rows)]
        axis.plot(ends, ends, color="0.6", linewidth=1, label="the bound")
        axis.set(xlabel="bound of the speed-up by arithmetic", ylabel="measured speed-up of a training step")
        axis.legend()
    return figure


def _shortened(text: str, most: int) -> str:
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _figure(down: int, across: int, inches: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False, **options)


def _style() -> Any:
    """The pictures' settings, as a context."""
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed; pip install matplotlib") from None
    there = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *[name for name in CJK_FONTS if name in there][:1]]  # the former is matplotlib's own
    return matplotlib.rc_context({**STYLE, "font.family": fonts})
