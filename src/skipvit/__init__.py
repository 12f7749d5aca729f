"""SkipViT on MindSpore: Vision Transformers whose unimportant tokens skip a span of blocks (arXiv 2401.15293).

    import skipvit

    net = skipvit.create_model("skipvit_small_patch16_224", num_classes=10)
    logits = net(images)  # (B, 3, 224, 224) normalised -> (B, 10)

Importing it also registers the models with mindcv, so that ``mindcv.create_model`` knows their names.
"""

import signal

# Threads that libraries start when they are imported (OpenBLAS's) do not take these signals: see train.StopSignal.
_signals_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
try:
    from skipvit.config import Config, ModelConfig, SkipConfig, UserError
    from skipvit.model import VisionTransformer, create_model
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _signals_before)

__version__ = "0.1.0"
__all__ = ["Config", "ModelConfig", "SkipConfig", "UserError", "VisionTransformer", "create_model"]
