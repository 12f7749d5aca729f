"""PyTorch's training step of the same ViT, as a contender of the benchmark; needs PyTorch, as nothing else does.

    python -m skipvit.benchmark --against "OTHER_PYTHON results/pytorch_step.py"

with OTHER_PYTHON the Python of an environment that has it. Eager mode, fused attention, exact GELU, its fused AdamW:
the plain way to write it.
"""

import json
import os
import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it


class Attention(nn.Module):
    """Multi-head self-attention on ``(B, T, D)``."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        """``(B, T, D)`` to ``(B, T, D)``."""
        batch, tokens, dim = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x):
        """``(B, T, D)`` to ``(B, T, D)``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The plain ViT."""

    def __init__(self, config, classes):
        super().__init__()
        dim, patch = config["embed_dim"], config["patch_size"]
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (config["image_size"] // patch) ** 2, dim))
        hidden = int(dim * config["mlp_ratio"])
        self.blocks = nn.Sequential(*(Block(dim, config["num_heads"], hidden) for _ in range(config["depth"])))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, images):
        """``(B, 3, S, S)`` to ``(B, C)``."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def resident_mb():
    """Memory this process has resident, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    """What `skipvit.benchmark.Contender` asks for."""
    config = json.loads(sys.stdin.readline())["config"]
    before = resident_mb()
    torch.manual_seed(0)
    model, batch = config["model"], config["data"]["batch_size"]
    classes = model["num_classes"]
    net = VisionTransformer(model, classes)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=config["optim"]["weight_decay"], fused=True)
    images = torch.rand(batch, 3, model["image_size"], model["image_size"])
    targets = F.one_hot(torch.randint(classes, (batch,)), classes).float()

    def step():
        started = time.perf_counter()
        loss = F.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started

    print(json.dumps({"first_step_seconds": step(), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"peak_mb": peak - before}), flush=True)
            return
        print(json.dumps({"ms": 1e3 * step()}), flush=True)


if __name__ == "__main__":
    main()
