"""A dense head on SkipViT's tokens: which patches of a picture show the object?

    python examples/segment_clutter.py runs/clutter/best.ckpt

`forward_features` gives every patch's token in image order, also of the patches that skipped the middle blocks. A
linear head is trained on the tokens of `clutter`'s training pictures, the network as it is, and tried on unseen
pictures: on the patches that were kept and on those that skipped. Beside it, for comparison, a head on what each patch
was before the first block; and the first head on each picture's tokens in a random order, so that only a token in its
place can be told right. Balanced accuracy is the mean of two shares, of object patches and of background
patches that are told right: 50% for a head that knows nothing, whatever it answers. Last a line of JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

import skipvit
from skipvit import clutter, runtime
from skipvit.data import ImageFolder, evaluation_image, mask_path, object_patches, open_image
from skipvit.log import run_command

BATCH_SIZE, STEPS, PATCHES_A_STEP = 50, 400, 2048


class Tokens(nn.Cell):
    """Tokens of all patches, what they were before the first block, and the patches that were kept; one graph."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, images):
        """``(B, 3, S, S)`` to ``(B, N, D)``, ``(B, N, D)`` and ``(B, K)``."""
        features = self.net.forward_features(images)[:, 1:]
        return features, self.net.embed(images)[:, 1:], self.net.kept_tokens(images)


def look(tokens, config, folder, masks, count):
    """Rows of patches, over ``count`` pictures: tokens, embeddings ``(P, D)``; is object, was kept ``(P,)`` bool."""
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (config.data.mean, config.data.std))
    parts = []
    chosen = np.linspace(0, len(folder) - 1, count).round().astype(int)
    for first in range(0, count - BATCH_SIZE + 1, BATCH_SIZE):
        batch = chosen[first : first + BATCH_SIZE]
        pixels = np.stack([evaluation_image(open_image(folder.path(index)), config) for index in batch])
        features, embedded, places = (value.asnumpy() for value in tokens(Tensor((pixels / 255 - mean) / std)))
        kept = np.zeros(features.shape[:2], bool)
        np.put_along_axis(kept, places, True, axis=1)
        is_object = [object_patches(mask_path(masks, folder.names[index]), config) > 0.5 for index in batch]
        parts.append([value.reshape(-1, *value.shape[2:]) for value in (features, embedded, np.stack(is_object), kept)])
    return [np.concatenate(column) for column in zip(*parts)]


def train_head(rows, is_object):
    """A linear head for object or background, of rows ``(P, D)``; both kinds weigh the same."""
    head = nn.Dense(rows.shape[1], 2)
    loss = nn.CrossEntropyLoss(Tensor([1 / (1 - is_object.mean()), 1 / is_object.mean()], dtype=Tensor(rows).dtype))
    step = nn.TrainOneStepCell(nn.WithLossCell(head, loss), nn.Adam(head.trainable_params(), 1e-2)).set_train()
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = generator.integers(0, len(rows), PATCHES_A_STEP)
        step(Tensor(rows[chosen]), Tensor(is_object[chosen].astype(np.int32)))
    return head


def balanced_accuracy(told, is_object):
    """Mean of the shares of object and of background patches told right, in percent."""
    return round(50 * float((told[is_object]).mean() + (~told[~is_object]).mean()), 1)


def main(checkpoint, pictures=1000, root=None):
    """See the module."""
    runtime.start()
    saved = skipvit.load_checkpoint(Path(checkpoint))
    root = root or clutter.ensure()
    tokens = Tokens(skipvit.build_model(saved))
    train, val = (
        look(tokens, saved.config, ImageFolder(root / part), root / "masks" / part, pictures)
        for part in ("train", "val")
    )
    tokens_of_val, embedded, is_object, kept = val
    places = np.arange(len(kept)).reshape(-1, saved.config.model.num_patches)
    shuffled = tokens_of_val[np.random.default_rng(0).permuted(places, axis=1).reshape(-1)]
    head, head_of_embeddings = train_head(train[0], train[2]), train_head(train[1], train[2])
    result = {}
    for name, trained, rows in (
        ("token", head, tokens_of_val),
        ("embedding", head_of_embeddings, embedded),
        ("shuffled", head, shuffled),
    ):
        told = trained(Tensor(rows)).asnumpy().argmax(1) == 1
        for which, chosen in (("kept", kept), ("skipped", ~kept)):
            result[f"{name}_{which}"] = balanced_accuracy(told[chosen], is_object[chosen])
    result["object_share_kept"] = round(100 * float(is_object[kept].mean()), 1)
    result["object_share_skipped"] = round(100 * float(is_object[~kept].mean()), 1)
    print("balanced accuracy                kept patches   skipped patches")
    for name, source in (
        ("token", "from the tokens"),
        ("embedding", "from the patches themselves"),
        ("shuffled", "from tokens in another order"),
    ):
        print(f"{source:32} {result[name + '_kept']:11.1f}%   {result[name + '_skipped']:14.1f}%")
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(run_command(lambda _: main(sys.argv[1])))
