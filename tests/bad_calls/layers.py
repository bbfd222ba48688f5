"""Constructors, and what a layer multiplies."""

import torch
from torch import nn

import sparsekern as sk

from . import LAYERS, close, layer, model, refused, works

# Constructors.

for bad in (0, -1, 3, 256, None, "16", True, 2.5, float("nan")):
    refused(
        f"block_size {bad!r}",
        lambda bad=bad: sk.SparseLinear(24, 40, block_size=bad),
        "block_size must be a power",
        bad,
    )
    refused(
        f"conv block_size {bad!r}", lambda bad=bad: sk.SparseConv2d(4, 8, 3, block_size=bad), "block_size must be", bad
    )
    refused(
        f"sparsify block_size {bad!r}", lambda bad=bad: sk.sparsify(model(), block_size=bad), "block_size must be", bad
    )
    refused(
        f"from_linear block_size {bad!r}",
        lambda bad=bad: sk.SparseLinear.from_linear(nn.Linear(24, 40), block_size=bad),
        "block_size must be",
        bad,
    )
for bad in (0, 0.0, -0.1, 1.5, float("nan"), float("inf"), None, "0.1", True, 1 + 2j):
    refused(f"density {bad!r}", lambda bad=bad: sk.SparseLinear(24, 40, density=bad), "density", bad)
    refused(f"conv density {bad!r}", lambda bad=bad: sk.SparseConv2d(4, 8, 3, density=bad), "density", bad)
    refused(f"sparsify density {bad!r}", lambda bad=bad: sk.sparsify(model(), density=bad), "density", bad)
    refused(f"set_density {bad!r}", lambda bad=bad: layer().set_density(bad), "density", bad)
    refused(
        f"from_linear density {bad!r}",
        lambda bad=bad: sk.SparseLinear.from_linear(nn.Linear(24, 40), density=bad),
        "density",
        bad,
    )
for bad in (0, -1, 3, None, "2", 1.5):
    refused(f"groups {bad!r}", lambda bad=bad: sk.SparseLinear(40, 40, groups=bad), "groups", bad)
for bad in (0, -4, None, "24", 2.5):
    refused(f"in_features {bad!r}", lambda bad=bad: sk.SparseLinear(bad, 40), "in_features", bad)
    refused(f"out_features {bad!r}", lambda bad=bad: sk.SparseLinear(24, bad), "out_features", bad)
for bad in ("x", 3, [0.1]):
    refused(f"topology {bad!r}", lambda bad=bad: sk.SparseLinear(24, 40, topology=bad), "topology", bad)
refused(
    "topology of another shape",
    lambda: sk.SparseLinear(24, 40, topology=sk.Topology.random((24, 24), 0.5, 8)),
    "topology is for shape",
)
for dtype in (torch.int32, torch.bool, torch.complex64):
    refused(f"layer of {dtype}", lambda dtype=dtype: sk.SparseLinear(24, 40, dtype=dtype), "dtype|floating")


def topology(rows, cols, shape=(40, 24), block_size=8, groups=1):
    return sk.Topology(torch.as_tensor(rows), torch.as_tensor(cols), shape, block_size, groups)


for name, rows, cols, sentence in (
    ("outside rows", [0, 5], [0, 0], "outside the 5 x 3 blocks"),
    ("outside cols", [0, 1], [0, 3], "outside the 5 x 3 blocks"),
    ("negative", [0, -2], [0, 0], "outside"),
    ("half dead", [0, -1], [0, 0], "outside"),
    ("twice", [1, 1], [2, 2], "live in two slots"),
    ("unequal lengths", [0, 1], [0], "one length"),
    ("two axes", [[0, 1]], [[0, 1]], "one length"),
    ("float", [0.0, 1.0], [0, 1], "tensor of integers"),
    ("bool", [True, False], [0, 1], "tensor of integers"),
    ("complex", [1j, 0j], [0, 1], "tensor of integers"),
    ("huge", [2**40, 0], [0, 1], "outside"),
):
    refused(f"Topology {name}", lambda rows=rows, cols=cols: topology(rows, cols), sentence)
    refused(
        f"replace {name}",
        lambda rows=rows, cols=cols: layer().topology.replace(torch.as_tensor(rows), torch.as_tensor(cols)),
        sentence,
    )
refused("Topology lists", lambda: sk.Topology([0], [0], (40, 24), 8), "tensor of integers, got list")
refused("Topology across groups", lambda: topology([0], [3], (32, 48), 8, 2), "groups")
for live in (0, -1, 16, [3, 3], [], [20], "3", None, float("nan"), 1.5, [True]):
    refused(f"Topology.random live {live!r}", lambda live=live: sk.Topology.random((40, 24), live, 8), "live|density")
for name, mask in (
    ("smaller", torch.ones(1, 3, 3, dtype=torch.bool)),
    ("larger", torch.ones(1, 9, 9, dtype=torch.bool)),
    ("float", torch.ones(1, 5, 3)),
    ("int", torch.ones(1, 5, 3, dtype=torch.int32)),
    ("4-D", torch.ones(1, 1, 5, 3, dtype=torch.bool)),
    ("1-D", torch.ones(15, dtype=torch.bool)),
    ("list", [[True]]),
    ("two groups", torch.ones(2, 5, 3, dtype=torch.bool)),
):
    refused(
        f"from_mask {name}", lambda mask=mask: sk.Topology.from_mask(mask, (40, 24), 8), "from_mask|multiple of groups"
    )
works(
    "from_mask 2-D",
    lambda: sk.Topology.from_mask(torch.ones(5, 3, dtype=torch.bool), (40, 24), 8).num_live == 15 or 1 / 0,
)

# What a layer multiplies.

for kind in LAYERS:
    width = 24
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        refused(
            f"{kind}: x of {dtype}",
            lambda kind=kind, dtype=dtype: layer(kind)(torch.randn(5, 24).to(dtype)),
            "one dtype, got",
        )
    for dtype in (torch.int64, torch.bool, torch.complex64):
        refused(
            f"{kind}: x of {dtype}",
            lambda kind=kind, dtype=dtype: layer(kind)(torch.ones(5, 24).to(dtype)),
            "floating-point numbers, got",
        )
    refused(f"{kind}: x on meta", lambda kind=kind: layer(kind)(torch.empty(5, 24, device="meta")), "on one device")
    refused(f"{kind}: x too narrow", lambda kind=kind: layer(kind)(torch.randn(5, 23)), "wants 24 features")
    refused(f"{kind}: x a number", lambda kind=kind: layer(kind)(torch.tensor(3.0)), "wants 24 features")
    works(f"{kind}: no tokens", lambda kind=kind: layer(kind)(torch.randn(0, 24)).sum().backward())
    works(
        f"{kind}: a vector",
        lambda kind=kind: (lambda m, x: close(m(x), m.to_linear()(x)))(layer(kind), torch.randn(24)),
    )
    works(
        f"{kind}: strides",
        lambda kind=kind: (lambda m, x: close(m(x), m.to_linear()(x)))(layer(kind), torch.randn(24, 7).t()),
    )
    works(
        f"{kind}: broadcast",
        lambda kind=kind: (lambda m, x: close(m(x), m.to_linear()(x)))(layer(kind), torch.randn(24).expand(5, 24)),
    )
refused(
    "conv: x too few channels",
    lambda: sk.SparseConv2d(4, 8, 3, density=0.5)(torch.randn(1, 3, 6, 6)),
    "must be \\[N, 4",
)
refused("conv: x a matrix", lambda: sk.SparseConv2d(4, 8, 3, density=0.5)(torch.randn(6, 6)), "must be \\[N, 4")
