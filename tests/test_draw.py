"""Pictures: what stands in them is what was given, and they can be written."""

import sys
import warnings

import numpy as np
import pytest

from skipvit import draw
from skipvit.config import UserError

pytest.importorskip("matplotlib")


def view(seed=0, title="", grid=5, side=20):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (side, side, 3)).astype(np.uint8)
    return draw.View(title, "heron", 0.25, image, generator.random((grid, grid)) > 0.5, generator.random((grid, grid)))


def panels(figure):
    """The pixels and title of each panel that shows something, line by line."""
    shown = [axis for axis in figure.axes if axis.images]
    return [(np.asarray(axis.images[0].get_array()), axis.get_title()) for axis in shown]


# --------------------------------------------------------------------------------------------------- tokens


def test_the_kept_patches_are_as_they_were_and_the_others_faded():
    shown = view()
    faded = draw.dimmed(shown.image, shown.kept)
    kept = np.kron(shown.kept, np.ones((4, 4), bool))
    assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(faded[kept], shown.image[kept])
    assert (faded[~kept] >= 255 * draw.DIMMED - 1).all()
    assert np.ptp(faded[~kept].astype(int)) > 20, "one can still see what was there"


def test_a_line_runs_between_kept_and_skipped():
    shown = view()._replace(kept=np.zeros((5, 5), bool))
    shown.kept[1, 2] = True
    figure = draw.tokens([draw.Row("a", [shown])])
    (drawn,) = (axis for axis in figure.axes if axis.collections)
    lines = [segment.tolist() for collection in drawn.collections for segment in collection.get_segments()]
    top, bottom, left, right = 3.5, 7.5, 7.5, 11.5  # pixels of 4 a patch; the first has its middle at 0
    assert lines == [
        *([[left, y], [right, y]] for y in (top, bottom)),
        *([[x, top], [x, bottom]] for x in (left, right)),
    ]


def test_a_grid_where_patches_do_not_divide_the_pictures_side():
    assert draw.dimmed(np.zeros((21, 21, 3), np.uint8), np.eye(5, dtype=bool)).shape == (21, 21, 3)


def test_each_image_has_its_row():
    rows = [draw.Row(f"photos/{name}.png", [view(seed)]) for seed, name in enumerate(("crow", "heron"))]
    shown = panels(draw.tokens(rows))
    assert len(shown) == 6
    for row, (image, kept, score) in zip(rows, (shown[:3], shown[3:])):
        np.testing.assert_array_equal(image[0], row.views[0].image)
        np.testing.assert_array_equal(kept[0], draw.dimmed(row.views[0].image, row.views[0].kept))
        np.testing.assert_allclose(score[0] ** 2, row.views[0].score - row.views[0].score.min(), atol=1e-12)
        assert image[1] == "heron 25%"
    first = rows[0].views[0].kept.sum()
    assert [title for _, title in shown[:3]] == ["heron 25%", f"{first} of 25 kept", "score"]


def test_what_is_compared_stands_side_by_side_and_is_named():
    rows = [draw.Row("photos/crow.png", [view(0, "old"), view(1, "new")])]
    figure = draw.tokens(rows)
    shown = panels(figure)
    assert len(shown) == 5
    assert shown[4][0].argmax() == rows[0].views[1].score.argmax()
    assert shown[0][1] == "crow"
    labels = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert labels == [f"{one.title}: {one.kept.sum()} of 25 kept" for one in rows[0].views]


def test_patches_that_were_no_candidates_have_no_shade():
    shown = view()
    shown.score[1, 2] = np.nan
    (_, _, (shade, _)) = panels(draw.tokens([draw.Row("a", [shown])]))
    assert np.argwhere(~np.isfinite(np.ma.filled(shade, np.nan))).tolist() == [[1, 2]]


@pytest.mark.parametrize("images", [1, 4, 5, 8])
def test_every_image_is_in_the_grid_once(images):
    shown = panels(draw.tokens([draw.Row(str(seed), [view(seed)]) for seed in range(images)]))
    assert len(shown) == 3 * images
    for seed in range(images):
        assert any(np.array_equal(pixels, view(seed).image) for pixels, _ in shown)


def test_any_name_can_be_drawn(tmp_path):
    """Also what matplotlib would take for a formula, or has no letters for."""
    for name in ("$x^$", "Größe", "鸟_"):
        shown = view()._replace(class_name=name)
        figure = draw.tokens([draw.Row("a", [shown])])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")
            draw.write(figure, tmp_path / "a.png")
        assert panels(figure)[0][1] == f"{name} 25%"


# --------------------------------------------------------------------------------------------------- curves


def run_records(epochs=3, steps=4):
    """``metrics.jsonl`` as a run writes it."""
    for step in range(1, epochs * steps + 1):
        speed = 50.0 * (step > 1)
        yield {"step": step, "loss": 1 / step, "learning_rate": 0.1 * step, "images_per_second": speed}
        if step % steps == 0:
            yield {"step": step, "epoch": step / steps, "top1": 10.0 * step, "images_per_second": 900.0}


def lines_of(figure):
    """Points of each curve, by the panel's title."""
    return {axis.get_title(loc="left"): [line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes}


def test_curves_are_what_the_metrics_say():
    figure = draw.curves({"run": list(run_records())})
    shown = lines_of(figure)
    assert shown["training loss"] == [[[step / 4, 1 / step] for step in range(1, 13)]]
    assert shown["Top-1, %"] == [[[1, 40], [2, 80], [3, 120]]]
    assert shown["images/s"] == [[[step / 4, 50] for step in range(2, 13)]], "not validation's, nor compilation's"
    assert figure.get_supxlabel() == "epoch"
    assert not figure.legends


def test_several_runs_are_told_apart():
    figure = draw.curves({"runs/a": list(run_records()), "runs/b": list(run_records(2, 3))})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["runs/a", "runs/b"]
    assert lines_of(figure)["Top-1, %"] == [[[1, 40], [2, 80], [3, 120]], [[1, 30], [2, 60]]]
    colours = [line.get_color() for line in figure.axes[1].lines]
    assert colours == [line.get_color() for line in figure.legends[0].get_lines()]


def test_a_run_that_has_not_validated_yet_is_drawn_over_steps():
    figure = draw.curves({"a": list(run_records()), "b": list(run_records(1, 9))[:5]})
    assert figure.get_supxlabel() == "step"
    assert [points[0] for points in lines_of(figure)["training loss"][:2]] == [[1, 1], [1, 1]]


def test_a_long_loss_is_smoothed_and_the_mean_is_right():
    records = [{"step": step, "loss": float(step % 2)} for step in range(1, 401)]
    faint, smooth = lines_of(draw.curves({"run": records}))["training loss"]
    assert len(faint) == 400
    assert (smooth[0], smooth[-1]) == ([4, 0.5], [396, 0.5])
    assert all(value == pytest.approx(0.5) for _, value in smooth)


def test_a_run_without_a_single_record_is_an_empty_picture():
    assert lines_of(draw.curves({"run": []}))["training loss"] == []


# --------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("PDF", b"%PDF"), ("svg", b"<?xml")])
def test_the_suffix_says_the_format(suffix, begins, tmp_path):
    path = tmp_path / f"a.{suffix}"
    draw.write(draw.tokens([draw.Row("a", [view()])]), path)
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize(("name", "said"), [("a.jpg", ".png .pdf .svg"), ("a", ".png"), ("no/a.png", "not a folder")])
def test_what_cannot_be_written_is_told_before_anything_is_done(name, said, tmp_path):
    with pytest.raises(UserError, match=said):
        draw.check_output(tmp_path / name)


def test_without_matplotlib_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw.curves({"run": list(run_records())})
