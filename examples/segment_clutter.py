"""A dense head on SkipViT's tokens: which patches of a picture show the object?

    python examples/segment_clutter.py runs/clutter/best.ckpt

`forward_features` gives every patch's token in image order, also of the patches that skipped the middle blocks. Linear
heads are trained on the tokens of `clutter`'s training pictures, the network as it is, and tried on unseen pictures: on
the patches that were kept and on those that skipped. One tells object from background; so does a patch by itself, for
`clutter`'s textures show in every patch. The other tells from a patch of background which class is in the picture: that
a token can know from others only. Beside both, the same heads on what each token was when kept and skipped were parted:
what a skipped one knows more it has learnt since it has rejoined.

Balanced accuracy is the mean over the answers of the share of their patches that are told right: 50% and 10% for a head
that knows nothing, whatever it answers. Last a line of JSON.
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
    """Tokens of all patches at the end, when they were parted, and before the first block; and the patches kept."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, images):
        """``(B, 3, S, S)`` to three times ``(B, N, D)``, and ``(B, K)``."""
        embedded = self.net.embed(images)
        parted = embedded
        for i in range(self.net.span_bounds[0][0]):
            parted, _ = self.net.run_block(i, parted, None, None, False)
        features = self.net.forward_features(images)
        return features[:, 1:], parted[:, 1:], embedded[:, 1:], self.net.kept_tokens(images)


def look(tokens, config, folder, masks, count):
    """Rows of patches, over ``count`` pictures: `Tokens`' three ``(P, D)``; is object, and the picture's class,
    -1 where some of the object is, ``(P,)`` int32; was kept ``(P,)`` bool.
    """
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (config.data.mean, config.data.std))
    parts = []
    chosen = np.linspace(0, len(folder) - 1, count).round().astype(int)
    for first in range(0, count - BATCH_SIZE + 1, BATCH_SIZE):
        batch = chosen[first : first + BATCH_SIZE]
        images = [open_image(folder.path(index)) for index in batch]
        pixels = np.stack([evaluation_image(image, config) for image in images])
        *rows, places = (value.asnumpy() for value in tokens(Tensor((pixels / 255 - mean) / std)))
        kept = np.zeros(rows[0].shape[:2], bool)
        np.put_along_axis(kept, places, True, axis=1)
        paths = [mask_path(masks, folder.names[index]) for index in batch]
        covered = np.stack([object_patches(path, image.size, config) for path, image in zip(paths, images)])
        classes = np.broadcast_to(folder.labels[batch, None], kept.shape)
        rows += [(covered > 0.5).astype(np.int32), np.where(covered > 0, -1, classes), kept]
        parts.append([value.reshape(-1, *value.shape[2:]) for value in rows])
    return [np.concatenate(column) for column in zip(*parts)]


def train_head(rows, label):
    """A linear head for the labels, of rows ``(P, D)``; all labels weigh the same."""
    counts = np.bincount(label)
    head = nn.Dense(rows.shape[1], len(counts))
    loss = nn.CrossEntropyLoss(Tensor((len(label) / len(counts) / counts).astype(np.float32)))
    step = nn.TrainOneStepCell(
        nn.WithLossCell(head, loss), nn.AdamWeightDecay(head.trainable_params(), 1e-2)
    ).set_train()
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = generator.integers(0, len(rows), PATCHES_A_STEP)
        step(Tensor(rows[chosen]), Tensor(label[chosen]))
    return head


def balanced_accuracy(told, label):
    """Mean over the labels of the share told right, in percent."""
    return round(100 * float(np.mean([(told[label == which] == which).mean() for which in np.unique(label)])), 1)


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
    result = {}
    print("balanced accuracy                                 kept patches   skipped patches")
    for task, column, question in (
        ("object", 3, "object or background?"),
        ("class", 4, "which class is in the picture?"),
    ):
        print(question)
        known, asked = train[column] >= 0, val[column] >= 0
        for index, (name, source) in enumerate(
            (
                ("token", "from the tokens"),
                ("parted", "from the tokens when they were parted"),
                ("patch", "from the patches themselves"),
            )
        ):
            head = train_head(train[index][known], train[column][known])
            told = head(Tensor(val[index])).asnumpy().argmax(1)
            kept, skipped = (
                balanced_accuracy(told[chosen], val[column][chosen]) for chosen in (asked & val[5], asked & ~val[5])
            )
            result.update({f"{task}_{name}_kept": kept, f"{task}_{name}_skipped": skipped})
            print(f"    {source:45} {kept:11.1f}%   {skipped:14.1f}%")
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(run_command(lambda _: main(sys.argv[1])))
