"""Images/s of the same augmentations in Pillow through PyTorch's DataLoader, one worker; needs PyTorch.

    python -m skipvit.benchmark CONFIG --input-only --against "OTHER_PYTHON results/pytorch_input.py" data.train=DIR …

Decode, random resized crop, flip, RandAugment (two operations of 15, each with probability one half, magnitude 9),
random erasing; to normalised floats, as torchvision has it, or with ``--bytes`` left in bytes for the device to
normalise, as timm's loader has it and ours too.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

SIZE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = tuple(round(255 * value) for value in MEAN)
MEAN_TENSOR, STD_TENSOR = torch.tensor(MEAN).reshape(3, 1, 1), torch.tensor(STD).reshape(3, 1, 1)


def affine(image, matrix):
    """Pillow's affine map, bicubic."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def enhance(kind):
    """An operation from one of Pillow's enhancers."""
    return lambda image, severity, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * severity))


def solarize_add(image, severity, sign):
    """Brighten the dark half."""
    table = [min(255, value + int(110 * severity)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS = (
    lambda image, severity, sign: ImageOps.autocontrast(image),
    lambda image, severity, sign: ImageOps.equalize(image),
    lambda image, severity, sign: ImageOps.invert(image),
    lambda image, severity, sign: image.rotate(sign * 30 * severity, Image.Resampling.BICUBIC, fillcolor=FILL),
    lambda image, severity, sign: ImageOps.posterize(image, max(1, 4 - int(4 * severity))),
    lambda image, severity, sign: ImageOps.solarize(image, 255 - int(255 * severity)),
    solarize_add,
    enhance(ImageEnhance.Color),
    enhance(ImageEnhance.Contrast),
    enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Sharpness),
    lambda image, severity, sign: affine(image, (1, sign * 0.3 * severity, 0, 0, 1, 0)),
    lambda image, severity, sign: affine(image, (1, 0, 0, sign * 0.3 * severity, 1, 0)),
    lambda image, severity, sign: affine(image, (1, 0, sign * 0.45 * severity * SIZE, 0, 1, 0)),
    lambda image, severity, sign: affine(image, (1, 0, 0, 0, 1, sign * 0.45 * severity * SIZE)),
)


def random_box(width, height):
    """RandomResizedCrop's box."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_width <= width and box_height <= height:
            left, top = random.randint(0, width - box_width), random.randint(0, height - box_height)
            return left, top, left + box_width, top + box_height
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


def erase(tensor):
    """Random erasing of a normalised tensor or of bytes, in place."""
    for _ in range(10):
        area = SIZE * SIZE * random.uniform(0.02, 1 / 3)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < SIZE and width < SIZE:
            top, left = random.randint(0, SIZE - height), random.randint(0, SIZE - width)
            noise = torch.randn(3, height, width)
            if tensor.dtype == torch.uint8:
                noise = noise.mul_(255 * STD_TENSOR).add_(255 * MEAN_TENSOR).round_().clamp_(0, 255)
            tensor[:, top : top + height, left : left + width] = noise
            return


class Images(Dataset):
    """A folder's JPEGs, augmented."""

    def __init__(self, folder, length, as_bytes):
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        self.length = length
        self.as_bytes = as_bytes

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        with open(self.paths[index % len(self.paths)], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=random_box(*image.size))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for _ in range(2):
            operation = random.choice(OPERATIONS)
            if random.random() < 0.5:
                severity = min(10, max(0, random.gauss(9, 0.5))) / 10
                image = operation(image, severity, random.choice((-1, 1)))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if not self.as_bytes:
            tensor = tensor.float().div_(255).sub_(MEAN_TENSOR).div_(STD_TENSOR)
        if random.random() < 0.25:
            erase(tensor)
        return tensor, index % 1000


def main():
    """Time batches after the first two."""
    folder, batch, steps = sys.argv[-3], int(sys.argv[-2]), int(sys.argv[-1])
    images = Images(folder, batch * (steps + 2), "--bytes" in sys.argv)
    torch.set_num_threads(1)
    loader = iter(DataLoader(images, batch, num_workers=1))
    next(loader), next(loader)
    started = time.perf_counter()
    for _ in range(steps):
        next(loader)
    print(json.dumps({"input_images_per_second": round(batch * steps / (time.perf_counter() - started), 1)}))


if __name__ == "__main__":
    main()
