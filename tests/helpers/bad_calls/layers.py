"""Constructors, and what a layer multiplies."""

import numpy
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

# Kinds of layers that multiply, and what each must refuse.


def conv(**options) -> sk.SparseConv2d:
    return sk.SparseConv2d(4, 8, 3, **{"density": 0.5, "block_size": 4} | options)


def image(**options) -> torch.Tensor:
    return torch.randn(2, 4, 6, 6, **options)


ALL = {kind: (lambda kind=kind: layer(kind), lambda: torch.randn(5, 24)) for kind in LAYERS} | {"conv": (conv, image)}

for kind, (make, operand) in ALL.items():
    for name, change, sentence in (
        ("None", lambda x: None, "x must be a tensor, got NoneType"),
        ("a list", lambda x: x.tolist(), "x must be a tensor, got list"),
        ("of numpy", lambda x: x.numpy(), "x must be a tensor, got ndarray"),
        ("a text", lambda x: "x", "x must be a tensor, got str"),
        ("of uint8", lambda x: x.byte(), "floating-point numbers, got torch.uint8"),
        ("complex", lambda x: x * 1j, "floating-point numbers, got torch.complex64"),
        ("of float64", lambda x: x.double(), "one dtype, got torch.float64 and torch.float32"),
        ("of bool", lambda x: x > 0, "floating-point numbers, got torch.bool"),
        ("on meta", lambda x: x.to("meta"), "one device, got meta and cpu"),
        ("sparse", lambda x: x.to_sparse(), "x must be dense, got torch.sparse_coo"),
    ):
        refused(f"{kind}: {name}", lambda m=make, o=operand, c=change: m()(c(o())), sentence)
    for name, change, sentence in (
        ("weight None", lambda m: m.register_parameter("weight", None), "weight must be a tensor, got NoneType"),
        ("fewer slots", lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach()[1:])), "wants a weight of shape"),
        ("a flat weight", lambda m: setattr(m, "weight", nn.Parameter(m.weight.flatten())), "wants a weight of shape"),
        ("its weight of float64", lambda m: setattr(m.weight, "data", m.weight.data.double()), "one dtype"),
        ("its bias shorter", lambda m: setattr(m, "bias", nn.Parameter(torch.zeros(3))), r"biases, got \(3,\)"),
        ("its bias of float64", lambda m: setattr(m.bias, "data", m.bias.data.double()), "one dtype"),
        ("a layer on meta", lambda m: m.to("meta"), "one device, got cpu and meta"),
        ("its topology on meta", lambda m: m.topology.to("meta"), "on cpu, but the topology is on meta"),
    ):
        refused(f"{kind}: {name}", lambda m=make, o=operand, c=change: (lambda w: (c(w), w(o())))(m()), sentence)
    for name, change in (
        ("that wants a gradient", lambda x: x.requires_grad_()),
        ("in reverse", lambda x: x.flip(-1)),
        ("conjugated", lambda x: torch.complex(x, x).conj().imag),
        ("of huge strides", lambda x: torch.randn(*x.shape, 100)[..., 7]),
        ("that overlaps", lambda x: x[:1].expand(x.shape)),
    ):
        works(f"{kind}: x {name}", lambda m=make, o=operand, c=change: equals_dense(m(), c(o())))
    works(f"{kind}: the empty batch", lambda m=make, o=operand: equals_dense(m(), o()[:0]))
    works(f"{kind}: strided weight", lambda m=make, o=operand: equals_dense(strided(m()), o()))
for kind in LAYERS:
    works(f"{kind}: three axes", lambda kind=kind: equals_dense(layer(kind), torch.randn(2, 3, 24)))
    works(f"{kind}: no tokens of three axes", lambda kind=kind: equals_dense(layer(kind), torch.randn(2, 0, 24)))
    refused(f"{kind}: no features", lambda kind=kind: layer(kind)(torch.randn(5, 0)), r"wants 24 features .* \(5, 0\)")
    refused(f"{kind}: ids without groups", lambda kind=kind: layer(kind)(torch.randn(5, 24), group=3), "group must be")
works("conv: channels last", lambda: equals_dense(conv(), image().to(memory_format=torch.channels_last)))
works("conv: one image", lambda: equals_dense(conv(), image()[0]))
refused("conv: an image smaller than the kernel", lambda: conv()(torch.randn(1, 4, 2, 2)), "[Kk]ernel size")


def equals_dense(m: sk.SparseLinear | sk.SparseConv2d, x: torch.Tensor) -> None:
    dense = m.to_linear() if isinstance(m, sk.SparseLinear) else m.to_conv2d()
    y = m(x)
    torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4, equal_nan=True)
    y.nan_to_num().sum().backward()


def strided(m: nn.Module) -> nn.Module:
    m.weight.data = m.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    return m


for name, run in (
    ("layer dtype", lambda bad: layer(dtype=bad)),
    ("conv dtype", lambda bad: conv(dtype=bad)),
):
    for bad in ("float32", 32, float):
        refused(f"{name} {bad!r}", lambda run=run, bad=bad: run(bad), "dtype must be", bad)
for bad in ("abacus", 3.5, "cpu:x"):
    refused(f"layer device {bad!r}", lambda bad=bad: layer(device=bad), "device", bad)
for bad in ((40,), (40, 24, 8), None, 40, "40", (40.0, 24), (0, 24), (40, None), (True, 24)):
    for name, run in (
        ("Topology", lambda bad: sk.Topology(torch.tensor([0]), torch.tensor([0]), bad, 8)),
        ("random", lambda bad: sk.Topology.random(bad, 0.5, 8)),
        ("from_mask", lambda bad: sk.Topology.from_mask(torch.ones(5, 3, dtype=torch.bool), bad, 8)),
    ):
        refused(f"{name} shape {bad!r}", lambda run=run, bad=bad: run(bad), "shape|out_features|in_features")
for bad in (0, 3, 256, None, "8", True):
    refused(
        f"random block_size {bad!r}", lambda bad=bad: sk.Topology.random((40, 24), 3, bad), "block_size must be", bad
    )
    refused(
        f"from_mask block_size {bad!r}",
        lambda bad=bad: sk.Topology.from_mask(torch.ones(5, 3, dtype=torch.bool), (40, 24), bad),
        "block_size must be",
        bad,
    )
for bad in (0, 3, None, "2", -1):
    refused(f"random groups {bad!r}", lambda bad=bad: sk.Topology.random((40, 40), 3, 8, bad), "groups", bad)
refused(
    "replace lists", lambda: layer().topology.replace([0], [0]), "block_rows must be a tensor of integers, got list"
)
refused(
    "replace None", lambda: layer().topology.replace(None, None), "block_rows must be a tensor of integers, got None"
)
for name, rows, cols in (("rows", "meta", "cpu"), ("cols", "cpu", "meta")):
    refused(
        f"Topology {name} on meta",
        lambda r=rows, c=cols: sk.Topology(torch.tensor([0], device=r), torch.tensor([0], device=c), (40, 24), 8),
        "one device, got .*meta",
    )
refused(
    "replace on meta",
    lambda: layer().topology.replace(*2 * (torch.zeros(3, dtype=torch.int64, device="meta"),)),
    "meta",
)
works(
    "no slots",
    lambda: equals_dense(layer(topology=topology(*2 * (torch.empty(0, dtype=torch.int64),))), torch.randn(5, 24)),
)
works("dead slots", lambda: equals_dense(layer(topology=topology([-1, 2, -1], [-1, 0, -1])), torch.randn(5, 24)))
works("block_size of numpy", lambda: equals_dense(layer(block_size=numpy.int64(8)), torch.randn(5, 24)))
works("density of numpy", lambda: equals_dense(layer(density=numpy.float32(0.3)), torch.randn(5, 24)))
refused("density a tensor", lambda: layer(density=torch.tensor(0.3)), "density must be", torch.tensor(0.3))
for name, options in (
    ("kernel_size", {"kernel_size": 0}),
    ("kernel_size", {"kernel_size": "3"}),
    ("kernel_size", {"kernel_size": None}),
    ("stride", {"stride": 0}),
    ("stride", {"stride": None}),
    ("dilation", {"dilation": 0}),
    ("padding", {"padding": -1}),
    ("padding", {"padding": "full"}),
    ("padding_mode", {"padding_mode": "zero"}),
    ("groups", {"groups": 3}),
    ("groups", {"groups": 0}),
    ("in_channels", {"in_channels": 0}),
    ("out_channels", {"out_channels": -8}),
    ("in_channels", {"in_channels": "4"}),
):
    bad = options[name]
    refused(
        f"conv {name} {bad!r}",
        lambda options=options: sk.SparseConv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3} | options),
        name.removeprefix("in_").removeprefix("out_"),
    )


# Coordinates, masks and ids of other storage; sizes that int32 does not hold; arguments that contradict a topology.


def nested(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([values, values[:1]])


PLACES = torch.tensor([0, 1])
for name, change in (
    ("sparse", lambda t: t.to_sparse()),
    ("nested", nested),
    ("of numpy", lambda t: t.numpy()),
    ("with gradients", lambda t: t.double().requires_grad_()),
):
    sentence = "must be dense|must be a tensor of integers"
    refused(f"Topology rows {name}", lambda c=change: sk.Topology(c(PLACES), PLACES, (40, 24), 8), sentence)
    refused(f"Topology cols {name}", lambda c=change: sk.Topology(PLACES, c(PLACES), (40, 24), 8), sentence)
    for kind in LAYERS:
        refused(
            f"{kind}: replace {name}", lambda k=kind, c=change: layer(k).topology.replace(*2 * (c(PLACES),)), sentence
        )
    refused(
        f"group ids {name}",
        lambda c=change: layer("groups")(torch.randn(2, 12), group=c(PLACES)),
        "group must be (dense|a tensor)|ids must be integers",
    )
for name, mask in (
    ("sparse", (torch.ones(5, 3) > 0).to_sparse()),
    ("on meta", torch.ones(5, 3, dtype=torch.bool, device="meta")),
    ("of no groups", torch.ones(0, 5, 3, dtype=torch.bool)),
    ("of numpy", numpy.ones((5, 3), dtype=bool)),
):
    refused(f"from_mask {name}", lambda mask=mask: sk.Topology.from_mask(mask, (40, 24), 8), "from_mask: mask|groups")
for ids in ([0, 2**62], [0, -(2**63)], [0, 2], [-1, 0]):
    refused(
        f"group ids {ids}",
        lambda ids=ids: layer("groups")(torch.randn(2, 12), group=torch.tensor(ids)),
        f"must be in 0..1, got {min(ids)}..{max(ids)}",
    )
refused("group ids of one group", lambda: layer()(torch.randn(2, 24), group=PLACES), "must be in 0..0, got 0..1")
for shape in ((2**33, 24), (40, 2**40)):
    name = "out_features" if shape[0] > 40 else "in_features"
    refused(
        f"Topology of shape {shape}",
        lambda s=shape: sk.Topology(PLACES, PLACES, s, 1),
        f"{name} must be under 2..31 blocks of 1",
        max(shape),
    )
for bad in (2, 3):
    refused(
        f"groups {bad} with a topology of one",
        lambda bad=bad: sk.SparseLinear(24, 48, groups=bad, topology=sk.Topology.random((48, 24), 0.5, 8)),
        "topology has 1 groups, got groups=",
        bad,
    )
for bad in ("no", "", None, [], torch.ones(40), 0.5):
    refused(f"bias {bad!r:.20}", lambda bad=bad: sk.SparseLinear(24, 40, bias=bad), "bias must be True or False", bad)
for options in ({"sparsity": 0.1}, {"densities": 0.1}, {"blocksize": 8}):
    refused(f"options {options}", lambda o=options: sk.SparseLinear(24, 40, **o), f"argument '{next(iter(options))}'")
for kind, (make, _) in ALL.items():
    for bad in (None, 3, [[1.0]], torch.randn(1, 3, 3), torch.randn(3), torch.tensor(1.0)):
        refused(
            f"{kind}: take_blocks {bad!r:.20}", lambda m=make, bad=bad: m().take_blocks(bad), "take_blocks: matrices"
        )
    for dtype in (torch.complex64, torch.int64, torch.bool):
        refused(
            f"{kind}: take_blocks of {dtype}",
            lambda m=make, d=dtype: (lambda m: m.take_blocks(m._matrices().to(d)))(m()),
            f"take_blocks: matrices must be real numbers .* got {dtype}",
        )
