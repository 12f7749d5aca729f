"""Converted weights against timm's own models on photographs: logits both ways; writes results/timm_parity.json.

    OTHER_PYTHON results/timm_parity.py FOLDER_OF_PHOTOGRAPHS PYTHON

with OTHER_PYTHON the Python of an environment with timm, and PYTHON the one that has MindSpore and skipvit. Nothing is
downloaded: the weights are random, of the size that keeps activations of order 1, so that nothing agrees by being 0.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # of a logit, float32
IMAGES = 8
# timm's name, and the image size to convert to.
CASES = [
    *((f"{kind}_{size}_patch16_224", 224) for kind in ("vit", "deit") for size in ("tiny", "small", "base")),
    ("deit_small_patch16_224", 288),
    ("vit_tiny_patch16_224", 160),
]
# Run by the Python that has MindSpore: logits of a checkpoint for photographs, prepared as evaluation does.
OURS = """
import sys
import numpy as np
from mindspore import Tensor
from skipvit import checkpoint, runtime
from skipvit.data import evaluation_image, open_image
from skipvit.inference import Classify
runtime.start()
saved = checkpoint.load(sys.argv[1])
pixels = np.stack([evaluation_image(open_image(path), saved.config) for path in sys.argv[3:]])
logits = Classify(checkpoint.build_model(saved), saved.config)(Tensor(pixels))[0].asnumpy()
np.savez(sys.argv[2], pixels=pixels, logits=logits)
"""


def randomize(model):
    """Weights of variance 1 / (values summed); norms and biases differ from 1 and 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if name.endswith("weight") else 1
                parameter.normal_(0, fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def compare(name, image_size, paths, python, folder):
    """Both ways for one model; what differed."""
    weights, resized = folder / f"{name}.safetensors", [f"model.image_size={image_size}"] * (image_size != 224)
    theirs = randomize(timm.create_model(name, pretrained=False))
    save_file(theirs.state_dict(), weights, metadata={"format": "pt"})
    subprocess.run([python, "-m", "skipvit.convert", weights, folder / "ours.ckpt", *resized], check=True, cwd=folder)
    subprocess.run([python, "-c", OURS, folder / "ours.ckpt", folder / "ours.npz", *paths], check=True, cwd=folder)
    ours = np.load(folder / "ours.npz")

    # To another image size: timm resamples with the filter that its own pretrained weights go through.
    theirs = timm.create_model(name, pretrained=False, img_size=image_size)
    load_checkpoint(theirs, str(weights), filter_fn=checkpoint_filter_fn)
    data = timm.data.resolve_data_config({}, model=theirs)
    transform = timm.data.create_transform(
        input_size=(3, image_size, image_size),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        mean=data["mean"],
        std=data["std"],
    )
    prepared = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    mean, std = (torch.tensor(data[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = (255 * (prepared * std + mean)).round().to(torch.uint8).numpy()
    with torch.no_grad():
        logits = theirs.eval()(prepared).numpy()

    # Back again, loaded strictly.
    back = folder / "back.safetensors"
    subprocess.run([python, "-m", "skipvit.convert", "--reverse", folder / "ours.ckpt", back], check=True, cwd=folder)
    returned = timm.create_model(name, pretrained=False, img_size=image_size)
    load_checkpoint(returned, str(back), strict=True)
    with torch.no_grad():
        returned_logits = returned.eval()(prepared).numpy()
    mine, timms = returned.state_dict(), theirs.state_dict()
    same = all(torch.equal(mine[key], timms[key]) for key in timms if key != "pos_embed" or image_size == 224)
    return {
        "model": name,
        "image_size": image_size,
        "largest_difference": float(np.abs(ours["logits"] - logits).max()),
        "largest_logit": float(np.abs(logits).max()),
        "standard_deviation_of_logits": float(logits.std()),
        "same_top1": bool((ours["logits"].argmax(1) == logits.argmax(1)).all()),
        "pixels_that_differ": int((pixels != ours["pixels"]).sum()),
        "largest_difference_back_in_timm": float(np.abs(returned_logits - logits).max()),
        "round_trip_exact": same,
        "largest_difference_of_position_embedding": float((mine["pos_embed"] - timms["pos_embed"]).abs().max()),
    }


def main(argv):
    """See the module."""
    if len(argv) != 2:
        sys.exit(__doc__)
    photographs = sorted(Path(argv[0]).resolve().glob("*.[jJ][pP]*"))
    paths = [str(path) for path in photographs[:: max(1, len(photographs) // IMAGES)]][:IMAGES]
    python = str(Path(argv[1]).absolute())
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(*case, paths, python, Path(folder)) for case in CASES]
    about = {"timm": timm.__version__, "torch": torch.__version__}
    about.update(json.loads(subprocess.run([python, "-c", VERSIONS], capture_output=True, check=True).stdout))
    content = {
        "command": "OTHER_PYTHON results/timm_parity.py FOLDER_OF_PHOTOGRAPHS PYTHON",
        "photographs": IMAGES,
        "tolerance": TOLERANCE,
        "passed": all(case["largest_difference"] < TOLERANCE for case in results),
        "models": results,
        "environment": about,
    }
    (ROOT / "results" / "timm_parity.json").write_text(json.dumps(content, indent=1) + "\n")
    for case in results:
        print(case)
    print("passed" if content["passed"] else "failed")


VERSIONS = "import json; from skipvit import runtime; print(json.dumps(runtime.versions()))"

if __name__ == "__main__":
    main(sys.argv[1:])
