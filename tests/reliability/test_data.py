"""The fast part: fewer broken images, through prediction alone; what trains is tried by the long part."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import runs
from test_data import make_config

from reliability import data as part
from skipvit import data
from skipvit.config import UserError


def test_broken_images_are_named_and_the_others_used(tmp_path):
    found = part.run(tmp_path, 90, commands=("predict",))
    assert found["cases"] == []
    assert found["unreadable"] > 40
    assert found["used"] > 20


def test_what_is_no_file_is_refused_at_once(tmp_path):
    """In a process of its own, for a pipe that is waited for would hold up the tests."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    program = """
import sys
from skipvit.data import UnreadableImage, open_image
for path in sys.argv[1:]:
    try:
        open_image(path)
    except UnreadableImage as error:
        print(error.reason)
"""
    paths = [str(tmp_path / name) for name in ("pipe.png", "device.png")]
    ended = subprocess.run(
        [sys.executable, "-c", program, *paths],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.splitlines() == ["a pipe, socket or device, not a file"] * 2


@pytest.mark.parametrize(("width", "height"), [(20_000, 1), (1, 20_000), (20_000, 300)])
def test_a_long_strip_takes_little_memory(width, height, tmp_path):
    config = make_config(size=224)
    image = part.noise(width, height)
    asked = []
    resize = image.__class__.resize

    def noted(self, size, *arguments, **options):
        asked.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image.__class__, "resize", noted)
        assert data.evaluation_image(image, config).shape == (3, 224, 224)
    assert max(asked) <= 33 * 256**2


def test_images_that_go_and_come_while_it_reads(tmp_path):
    runs.write_images(tmp_path, 16)
    folder = data.ImageFolder(tmp_path)
    source = data.TrainBatches(folder, make_config(), batch_size=4, epochs=3)
    before = source[0]
    for index in range(4):
        folder.path(index).unlink()
    runs.write_images(tmp_path, 4, ("owl",))
    items = [source[index] for index in range(len(source))]
    assert [len(images) for images, _ in items] == [4] * 12
    assert source.unreadable().tolist() == [0, 1, 2, 3]
    assert before[1].shape == items[0][1].shape == (4, 2), "the folder that came is no class of this run"
    with pytest.raises(UserError, match=r"4 of 16 images cannot be read \(25.00%; .* allows 20.00%\)"):
        data.UnreadableCount(folder, 0.2).update(source.unreadable())


def test_training_names_what_it_leaves_out_of_a_validation_up_to_the_share(tmp_path):
    """And what it had trained is there when the share is exceeded."""
    runs.write_images(tmp_path / "train", 8)
    val = runs.write_images(tmp_path / "val", 8)
    (val / "crow" / "000.png").write_bytes(b"")
    allowed = runs.write_recipe(tmp_path / "allowed.yaml", data={"max_unreadable_share": 0.2})
    refused = runs.write_recipe(tmp_path / "refused.yaml", train={"output": "refused"})
    results = {}

    def train(name, recipe):
        results[name] = runs.run("train", recipe, "train.stop_after_epochs=1", cwd=tmp_path)

    threads = [threading.Thread(target=train, args=item) for item in (("allowed", allowed), ("refused", refused))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["allowed"].returncode == 0, results["allowed"].stderr
    warning = "warning: left out of the validation, cannot be read: val/crow/000.png"
    assert results["allowed"].stdout.count(warning) == 1
    runs.assert_bad_input(
        results["refused"].returncode, results["refused"].stderr, "data.val: 1 of 8", "val/crow/000.png", "1.00%"
    )
    assert Path(tmp_path, "refused", "last.ckpt").exists()
