"""SkipViT on MindSpore: Vision Transformers whose unimportant tokens skip a span of blocks (arXiv 2401.15293).

    import skipvit

    net = skipvit.create_model("skipvit_small_patch16_224", num_classes=10)
    logits = net(images)  # (B, 3, 224, 224) normalised -> (B, 10)
    tokens = net.forward_features(images)  # (B, 1+196, 384), CLS first, then patches row by row
    patches = net.kept_tokens(images)  # (B, 88) indices of the patches that went through the middle blocks

    saved = skipvit.load_checkpoint("runs/clutter/best.ckpt")
    net = skipvit.build_model(saved)  # for images normalised by saved.config.data.mean and .std
    saved.meta["classes"]  # names, in the order of the logits

Importing it also registers the models with mindcv, so that ``mindcv.create_model`` knows their names.
"""

import os
import signal
import sys

# Threads that libraries start when they are imported (OpenBLAS's) do not take these signals: see train.StopSignal.
_signals_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
try:
    from skipvit.checkpoint import Checkpoint, build_model
    from skipvit.checkpoint import load as load_checkpoint
    from skipvit.config import Config, ModelConfig, SkipConfig, UserError
    from skipvit.model import VisionTransformer, create_model
finally:
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, _signals_before)
    except KeyboardInterrupt:
        if sys.argv[0] != "-m":  # Python's mark of a command that is just being found
            raise
        os._exit(128 + signal.SIGINT)

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "Config",
    "ModelConfig",
    "SkipConfig",
    "UserError",
    "VisionTransformer",
    "build_model",
    "create_model",
    "load_checkpoint",
]
