"""The model: a pre-norm GPT of plain torch modules.

Attention has linear biases by distance (ALiBi, Press et al. 2022) in the place of learned positions: after 300 steps of
512 bytes the held-out text takes 3.25 bits a byte with them and 3.58 with rotations (set-d0.1-b16-erk, rate 1e-3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    width: int = 512
    context: int = 256
    heads: int = 8


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.register_buffer("bias", distance_bias(shape), persistent=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, t = self.embedding(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.bias[:, :, :t, :t])
        return self.head(self.norm(x))


def distance_bias(shape: Shape) -> Tensor:
    """[1, heads, context, context]: minus distance times a slope of the head, and minus infinity towards the future."""
    places = torch.arange(shape.context)
    distance = (places[:, None] - places).float()
    slopes = 2.0 ** (-8 * torch.arange(1, shape.heads + 1) / shape.heads)
    return torch.where(distance < 0, -torch.inf, -distance * slopes[:, None, None])[None]


def live_weights(model: GPT) -> int:
    """Of all linear layers but the head."""
    total = 0
    for module in model.blocks.modules():
        if isinstance(module, sk.SparseLinear):
            total += int(module.topology.num_live) * module.block_size**2
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
    return total


def density(model: GPT) -> float:
    return live_weights(model) / (12 * model.shape.layers * model.shape.width**2)


def flops(shape: Shape, weights: float) -> float:
    """Of one token's forward and backward: 6 a weight, and attention over half of the context on average."""
    return 6 * (weights + VOCABULARY * shape.width) + 6 * shape.layers * shape.context * shape.width


def narrow(shape: Shape, share: float) -> Shape:
    """The widest dense model of no more FLOPs than one of this shape with the given density."""
    limit = flops(shape, share * 12 * shape.layers * shape.width**2)
    step = 2 * shape.heads
    fitting = [
        candidate
        for width in range(step, shape.width + 1, step)
        if flops(candidate := Shape(shape.layers, width, shape.context, shape.heads), 12 * shape.layers * width**2)
        <= limit
    ]
    return fitting[-1]
