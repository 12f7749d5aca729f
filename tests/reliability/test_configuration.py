"""The fast part: fewer recipes and tables, other ones each release of hypothesis; and absurd sizes by name."""

import pytest
import runs

from reliability import configuration as part
from skipvit.config import UserError, load


def test_any_recipe_or_table_is_accepted_or_refused_by_one_line(tmp_path):
    found = part.run(tmp_path, 100)
    assert found["cases"] == []
    assert found["accepted"] > 5
    assert found["refused"] > 50


@pytest.mark.parametrize(
    "override",
    [
        "model.embed_dim=1e9",
        "model.depth=1000000000",
        "model.image_size=1000000",
        "model.num_classes=1000000000",
        "data.batch_size=1000000000",
        "data.num_workers=1000000",
        "augment.shift_pixels=1000000000",
        "augment.rand_augment_layers=1000000000",
        "data.val_crop_ratio=1e-9",
        "augment.mixup=1e300",
    ],
)
def test_what_would_take_all_memory_or_time_is_refused(override, tmp_path):
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        load(runs.write_recipe(tmp_path / "recipe.yaml"), [override])
