"""Calls that no one should make, each in a process of its own: `python tests/bad_calls.py` prints what became of them.

A call is refused by a sentence that names what is wrong, or works and has the right value. Anything else is a fault: a
crash, an answer without a word, or an error of Python's or torch's own that names nothing of ours.
"""

import copy
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import sparsekern as sk

SECONDS = 20  # that a call may take
DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
NO_INTEGERS = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


@dataclass(frozen=True)
class Call:
    name: str
    run: Callable[[], object]
    refused: str | None
    """what the sentence must say, as a regular expression; None: the call works and checks its value itself"""


CALLS: list[Call] = []


def refused(name: str, run: Callable[[], object], sentence: str) -> None:
    CALLS.append(Call(name, run, sentence))


def works(name: str, run: Callable[[], object]) -> None:
    CALLS.append(Call(name, run, None))


LAYERS = {
    "block 8": {"density": 0.4, "block_size": 8},
    "block 1": {"density": 0.4, "block_size": 1},
    "full": {"density": 1.0, "block_size": 8},
    "padded": {"density": 0.4, "block_size": 16},
    "groups": {"density": 0.5, "block_size": 4, "groups": 2},
}


def layer(kind: str = "block 8", **options) -> sk.SparseLinear:
    return sk.SparseLinear(24, 40, **LAYERS[kind] | options)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))


def sparse_model(density: float = 0.4) -> nn.Sequential:
    return sk.sparsify(model(), density=density, block_size=8)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# Constructors.

for bad in (0, -1, 3, 256, None, "16", True, 2.5, float("nan")):
    refused(
        f"block_size {bad!r}", lambda bad=bad: sk.SparseLinear(24, 40, block_size=bad), "block_size must be a power"
    )
    refused(f"conv block_size {bad!r}", lambda bad=bad: sk.SparseConv2d(4, 8, 3, block_size=bad), "block_size must be")
    refused(f"sparsify block_size {bad!r}", lambda bad=bad: sk.sparsify(model(), block_size=bad), "block_size must be")
    refused(
        f"from_linear block_size {bad!r}",
        lambda bad=bad: sk.SparseLinear.from_linear(nn.Linear(24, 40), block_size=bad),
        "block_size must be",
    )
for bad in (0, 0.0, -0.1, 1.5, float("nan"), float("inf"), None, "0.1", True, 1 + 2j):
    refused(f"density {bad!r}", lambda bad=bad: sk.SparseLinear(24, 40, density=bad), "density")
    refused(f"conv density {bad!r}", lambda bad=bad: sk.SparseConv2d(4, 8, 3, density=bad), "density")
    refused(f"sparsify density {bad!r}", lambda bad=bad: sk.sparsify(model(), density=bad), "density")
    refused(f"set_density {bad!r}", lambda bad=bad: layer().set_density(bad), "density")
    refused(
        f"from_linear density {bad!r}",
        lambda bad=bad: sk.SparseLinear.from_linear(nn.Linear(24, 40), density=bad),
        "density",
    )
for bad in (0, -1, 3, None, "2", 1.5):
    refused(f"groups {bad!r}", lambda bad=bad: sk.SparseLinear(40, 40, groups=bad), "groups")
for bad in (0, -4, None, "24", 2.5):
    refused(f"in_features {bad!r}", lambda bad=bad: sk.SparseLinear(bad, 40), "in_features")
    refused(f"out_features {bad!r}", lambda bad=bad: sk.SparseLinear(24, bad), "out_features")
for bad in ("x", 3, [0.1]):
    refused(f"topology {bad!r}", lambda bad=bad: sk.SparseLinear(24, 40, topology=bad), "topology")
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

# Group ids and token offsets.

IDS, OFFSETS = [1, 0, 0, 1, 1], [0, 2, 5]


def by_ids(ids, x=None):
    torch.manual_seed(0)
    heads = layer("groups")
    x = torch.randn(5, 12) if x is None else x
    y = heads(x, group=ids)
    matrices = heads.to_dense()
    biases = heads.bias.view(2, 20)
    parts = [matrices[20 * g : 20 * g + 20, 12 * g : 12 * g + 12] for g in IDS]
    close(y, torch.stack([part @ row + biases[g] for row, part, g in zip(x, parts, IDS, strict=True)]))


def by_offsets(offsets, dy=False):
    torch.manual_seed(0)
    heads, x = layer("groups"), torch.randn(5, 12)
    if dy:
        return sk.sdd(torch.randn(5, 20), x, heads.topology, offsets)
    y = sk.dds(x, heads.weight, heads.topology, transpose=True, token_offsets=offsets)
    matrices = heads.to_dense()
    expected = [x[:2] @ matrices[:20, :12].t(), x[2:] @ matrices[20:, 12:].t()]
    close(y, torch.cat(expected))


for dtype in DTYPES:
    works(f"group ids of {dtype}", lambda dtype=dtype: by_ids(torch.tensor(IDS).to(dtype)))
    works(f"offsets of {dtype}", lambda dtype=dtype: by_offsets(torch.tensor(OFFSETS).to(dtype)))
    works(
        f"strided offsets of {dtype}",
        lambda dtype=dtype: by_offsets(torch.tensor([[o, 99] for o in OFFSETS]).to(dtype)[:, 0]),
    )
    works(f"strided ids of {dtype}", lambda dtype=dtype: by_ids(torch.tensor([[i, 99] for i in IDS]).to(dtype)[:, 0]))
for dtype in NO_INTEGERS:
    refused(f"group ids of {dtype}", lambda dtype=dtype: by_ids(torch.tensor(IDS).to(dtype)), "ids must be integers")
    refused(f"offsets of {dtype}", lambda dtype=dtype: by_offsets(torch.tensor(OFFSETS).to(dtype)), "must be integers")
    refused(
        f"sdd: offsets of {dtype}", lambda dtype=dtype: by_offsets(torch.tensor(OFFSETS).to(dtype), True), "integers"
    )
for name, ids, sentence in (
    ("too large", [0, 0, 1, 1, 2], "must be in 0..1, got 0..2"),
    ("negative", [0, 0, 1, 1, -1], "must be in 0..1, got -1..1"),
    ("too few", [0, 1], "one id per token"),
    ("two axes", [IDS], "one id per token"),
):
    refused(f"group ids {name}", lambda ids=ids: by_ids(torch.tensor(ids)), sentence)
refused("group ids on meta", lambda: by_ids(torch.zeros(5, dtype=torch.int64, device="meta")), "ids are on meta")
refused("group ids a list", lambda: by_ids(IDS), "group must be a tensor")
for name, offsets, sentence in (
    ("too short", [0, 5], "want 3 token offsets"),
    ("too long", [0, 1, 2, 5], "want 3 token offsets"),
    ("falling", [0, 6, 5], "must rise from 0 to 5"),
    ("not from 0", [1, 2, 5], "must rise from 0 to 5"),
    ("beyond", [0, 2, 6], "must rise from 0 to 5"),
    ("short of the end", [0, 2, 4], "must rise from 0 to 5"),
    ("negative", [0, -2, 5], "must rise from 0 to 5"),
    ("two axes", [[0, 2, 5]], "want 3 token offsets"),
):
    refused(f"offsets {name}", lambda offsets=offsets: by_offsets(torch.tensor(offsets)), sentence)
    refused(f"sdd: offsets {name}", lambda offsets=offsets: by_offsets(torch.tensor(offsets), True), sentence)
refused("offsets on meta", lambda: by_offsets(torch.zeros(3, dtype=torch.int64, device="meta")), "offsets are on meta")
refused("offsets a list", lambda: by_offsets(OFFSETS), "token_offsets must be a tensor")

# The products and the registered operators, called directly.


def product(change=(), operator=None, **options):
    torch.manual_seed(0)
    m = layer()
    operands = {"x": torch.randn(5, 24), "weight": m.weight.detach(), "topology": m.topology, "bias": m.bias.detach()}
    return sk.dds(**operands | {"transpose": True} | dict(change) | options)


for name, change, sentence in (
    ("weight of fewer slots", {"weight": torch.randn(2, 8, 8)}, "wants a weight of shape"),
    ("weight of other blocks", {"weight": torch.randn(6, 4, 4)}, "wants a weight of shape"),
    ("dense weight", {"weight": torch.randn(40, 24)}, "wants a weight of shape"),
    ("bias too short", {"bias": torch.randn(3)}, "wants 40 biases"),
    ("bias of another dtype", {"bias": torch.randn(40).double()}, "one dtype"),
    ("bias without transpose", {"x": torch.randn(5, 40), "transpose": False}, "bias belongs to"),
    ("topology a layer", {"topology": nn.Linear(3, 3)}, "topology must be"),
    ("topology None", {"topology": None}, "topology must be"),
    ("x a list", {"x": [[1.0]]}, "x must be a tensor"),
    ("weight None", {"weight": None}, "weight must be a tensor"),
):
    refused(f"dds {name}", lambda change=change: product(change), sentence)


def direct(name="dds", change=None, **tensors):
    t = layer().topology
    layout = t.layout._replace(**change or {})
    operands = {"x": torch.randn(5, 24), "weight": torch.randn(t.num_slots, 8, 8), "dy": torch.randn(5, 40)} | tensors
    if name == "sdd":
        return torch.ops.sparsekern.sdd(operands["dy"], operands["x"], None, *layout)
    return torch.ops.sparsekern.dds(operands["x"], operands["weight"], None, None, *layout, True)


rows, cols, index = layer().topology.layout.tensors
for name, change, sentence in (
    ("rows outside", {"block_rows": rows + 30}, "outside"),
    ("rows float", {"block_rows": rows.float()}, "integers"),
    ("rows shorter", {"block_rows": rows[:-1]}, "one length"),
    ("cols outside", {"block_cols": cols + 30}, "outside"),
    ("index shorter", {"index": index[:-1].clone()}, "want an index"),
    ("index of int64", {"index": index.long()}, "want an index"),
    ("a full store that is none", {"full": True}, "full"),
    ("more rows than the index", {"num_rows": 500}, "want an index|x must be|index must have"),
    ("no groups", {"groups": 0}, "groups"),
    ("block size 7", {"block_size": 7}, "block_size|weight must be|x must be"),
):
    refused(f"operator: {name}", lambda change=change: direct(change=change), sentence)
    refused(f"operator sdd: {name}", lambda change=change: direct("sdd", change=change), sentence + "|dy must be")
refused("operator: x too wide", lambda: direct(x=torch.randn(5, 32)), "x must be")
refused("operator: x of 3 axes", lambda: direct(x=torch.randn(5, 1, 24)), "x must be")
refused("operator: weight of fewer slots", lambda: direct(weight=torch.randn(2, 8, 8)), "weight must be")
refused("operator: weight of float64", lambda: direct(weight=torch.randn(6, 8, 8).double()), "weight must be")
refused("operator sdd: dy of fewer tokens", lambda: direct("sdd", dy=torch.randn(4, 40)), "4 tokens")

# Backends.


def with_backend(name, run):
    with sk.use(name):
        return run()


for bad in ("abacus", "", None, 3, "CPU"):
    refused(f"use {bad!r}", lambda bad=bad: with_backend(bad, lambda: None), "backend .* is unknown")
refused(
    "use cpu, float64",
    lambda: with_backend("cpu", lambda: layer().double()(torch.randn(5, 24).double())),
    "takes float32",
)
refused(
    "use cpu, float16", lambda: with_backend("cpu", lambda: layer().half()(torch.randn(5, 24).half())), "takes float32"
)
refused("use triton", lambda: with_backend("triton", lambda: layer()(torch.randn(5, 24))), "backend 'triton'")

# Checkpoints and coordinates that are written in place.


def load(change, strict=True, drop=()):
    source, target = layer(), layer()
    state = {name: value for name, value in source.state_dict().items() if name not in drop} | change(source)
    before = copy.deepcopy(target.state_dict())
    try:
        target.load_state_dict(state, strict=strict)
    except Exception:
        for name, value in target.state_dict().items():
            assert torch.equal(value, before[name]) or not strict or drop, f"{name} changed"
        target(torch.randn(3, 24))
        raise


T = "topology."
for name, change, sentence in (
    ("rows float", lambda m: {T + "block_rows": m.topology.block_rows.float()}, "integers"),
    (
        "rows twice",
        lambda m: {T + "block_rows": m.topology.block_rows * 0, T + "block_cols": m.topology.block_cols * 0},
        "two slots",
    ),
    ("rows outside", lambda m: {T + "block_rows": m.topology.block_rows + 50}, "outside"),
    ("rows shorter", lambda m: {T + "block_rows": m.topology.block_rows[:-1]}, "one length"),
    ("weight complex", lambda m: {"weight": m.weight.detach() * 1j}, "real numbers"),
    ("weight int", lambda m: {"weight": m.weight.detach().int()}, "real numbers"),
    ("weight dense", lambda m: {"weight": m.to_dense()}, "must have shape"),
    ("weight of other blocks", lambda m: {"weight": torch.randn(6, 4, 4)}, "must have shape"),
    ("weight shorter", lambda m: {"weight": m.weight.detach()[:-1]}, "slots"),
    ("geometry short", lambda m: {T + "_extra_state": torch.tensor([40, 24])}, "5 integers"),
    ("geometry float", lambda m: {T + "_extra_state": torch.tensor([40.0, 24, 8, 1, 0])}, "5 integers"),
    (
        "geometry other",
        lambda m: {T + "_extra_state": torch.tensor([40, 32, 8, 1, 0])},
        "the checkpoint's topology has",
    ),
    ("geometry None", lambda m: {T + "_extra_state": None}, "5 integers"),
):
    for strict in (True, False):
        refused(f"load {name}, strict={strict}", lambda c=change, s=strict: load(c, s), sentence)
refused("load without weight", lambda: load(lambda m: {}, False, ("weight",)), "no weight")


def written(change, use=lambda m: m(torch.randn(3, 24))):
    m = layer()
    with torch.no_grad():
        change(m.topology)
    return use(m)


for kind, use in (
    ("forward", lambda m: m(torch.randn(3, 24))),
    ("sdd", lambda m: sk.sdd(torch.randn(3, 40), torch.randn(3, 24), m.topology)),
    ("to_dense", lambda m: m.to_dense()),
    ("deepcopy", copy.deepcopy),
):
    refused(f"{kind} after rows outside", lambda use=use: written(lambda t: t.block_rows.fill_(9), use), "outside")
    refused(
        f"{kind} after one block twice",
        lambda use=use: written(lambda t: (t.block_rows.fill_(1), t.block_cols.fill_(1)), use),
        "two slots",
    )

# Conversions.

for name, mask in (
    ("empty", torch.zeros(40, 24, dtype=torch.bool)),
    ("of another shape", torch.ones(24, 40, dtype=torch.bool)),
    ("float", torch.ones(40, 24)),
    ("a word", "largest"),
    ("None", None),
    ("a number", 3),
):
    for kind, run in (
        ("from_linear", lambda mask: sk.SparseLinear.from_linear(nn.Linear(24, 40), 0.4, 8, keep=mask)),
        ("set_density", lambda mask: layer().set_density(0.2, keep=mask)),
        ("sparsify", lambda mask: sk.sparsify(nn.Sequential(nn.Linear(24, 40)), 0.4, 8, keep=mask)),
    ):
        refused(f"{kind} keep {name}", lambda run=run, mask=mask: run(mask), "keep")
for bad in ([0.1], [0.1, 0.2, 0.3], [3, -1], [3, 99], [0.1, 1.5], ["a", "b"], [], [True, True], [float("nan"), 0.5]):
    refused(f"set_density {bad!r}", lambda bad=bad: layer("groups").set_density(bad), "density")
works("set_density of lists", lambda: layer("groups").set_density([3, 5]) or layer("groups").set_density([0.2, 0.4]))
for name, options, sentence in (
    ("density {}", {"density": {}}, "density must name"),
    ("block_size {}", {"block_size": {}}, "block_size must name"),
    ("density by number", {"density": {3: 0.1}}, "density must be keyed"),
    ("distribution", {"distribution": "erdos"}, "distribution must be"),
    ("distribution None", {"distribution": None}, "distribution must be"),
    ("exclude a text", {"exclude": "head*"}, "exclude must be a list"),
    ("exclude None", {"exclude": None}, "exclude must be a list"),
    ("exclude numbers", {"exclude": [3]}, "exclude must hold patterns"),
    ("modules a text", {"modules": "linear"}, "modules may hold"),
    ("modules None", {"modules": None}, "modules may hold"),
    ("modules others", {"modules": [nn.Embedding]}, "modules may hold"),
    ("optimizer a text", {"optimizer": "adam"}, "optimizer must be"),
    ("optimizer []", {"optimizer": []}, "optimizer is an empty list"),
):
    refused(f"sparsify {name}", lambda options=options: sk.sparsify(model(), **{"density": 0.3} | options), sentence)
works("modules a single type", lambda: sk.sparsify(model(), 0.3, 8, modules=nn.Linear)[0].density < 0.5 or 1 / 0)
for bad in (None, 3, "model", torch.randn(3)):
    for name in ("plan", "sparsify", "densify", "summary"):
        refused(f"{name} of {bad!r:.20}", lambda name=name, bad=bad: getattr(sk, name)(bad), f"{name}|plan")
refused("from_linear of a convolution", lambda: sk.SparseLinear.from_linear(nn.Conv2d(4, 4, 3)), "wants an nn.Linear")
refused("from_linear None", lambda: sk.SparseLinear.from_linear(None), "wants an nn.Linear")
refused("from_conv2d of a linear", lambda: sk.SparseConv2d.from_conv2d(nn.Linear(4, 4)), "wants an nn.Conv2d")
refused(
    "from_conv2d transposed", lambda: sk.SparseConv2d.from_conv2d(nn.ConvTranspose2d(4, 4, 3)), "wants an nn.Conv2d"
)
refused("to_bsr of a padded layer", lambda: layer("padded").to_bsr(), "no multiple of block_size")
refused("init_ of a dense layer", lambda: sk.init_(nn.Linear(4, 4), nn.init.xavier_uniform_), "layer must be")
refused("init_ without a rule", lambda: sk.init_(layer(), None), "function must be callable")
for bad in ({}, {"weight": torch.randn(3)}, None, 3):
    refused(f"plan_from {bad!r:.20}", lambda bad=bad: sk.plan_from(bad), "plan_from")
    refused(f"load {bad!r:.20}", lambda bad=bad: sk.load(model(), bad), "load|plan_from")
refused(
    "load of another model",
    lambda: sk.load(nn.Sequential(nn.Linear(8, 8)), sparse_model().state_dict()),
    "plan has|shape",
)

# Rules.


def rule(kind=sk.SET, made=None, optimizer=None, **options):
    made = sparse_model() if made is None else made
    optimizer = torch.optim.Adam(made.parameters()) if optimizer is None else optimizer
    if kind is sk.GMP:
        options = {"start_step": 0, "end_step": 10} | options
    return kind(made, optimizer, **{"update_every": 1} | options)


for kind in (sk.SET, sk.RigL, sk.GMP):
    k = kind.__name__
    for bad in (float("nan"), float("inf"), -1, 0, "3", None):
        refused(f"{k} update_every {bad!r}", lambda kind=kind, bad=bad: rule(kind, update_every=bad), "update_every")
    for bad in (float("nan"), float("inf"), "3", None):
        refused(f"{k} start_step {bad!r}", lambda kind=kind, bad=bad: rule(kind, start_step=bad), "start_step")
    for bad in (float("nan"), float("inf"), "3", -5):
        refused(f"{k} end_step {bad!r}", lambda kind=kind, bad=bad: rule(kind, end_step=bad), "end_step")
    for bad in (float("nan"), float("inf"), "3"):
        refused(f"{k} clock {bad!r}", lambda kind=kind, bad=bad: rule(kind).step(clock=bad), "clock")
    refused(
        f"{k} clock back", lambda kind=kind: (lambda r: (r.step(clock=5), r.step(clock=4)))(rule(kind)), "backwards"
    )
    for bad in (None, "adam", 3, []):
        refused(
            f"{k} optimizer {bad!r}",
            lambda kind=kind, bad=bad: kind(sparse_model(), bad, **({"end_step": 9} if kind is sk.GMP else {})),
            "optimizer",
        )
    refused(
        f"{k} optimizer of another model",
        lambda kind=kind: rule(kind, optimizer=torch.optim.SGD(model().parameters(), 0.1)),
        "does not hold the weight",
    )
    for name in ("LBFGS", "Adafactor"):
        refused(
            f"{k} {name}",
            lambda kind=kind, name=name: (lambda m: rule(kind, m, getattr(torch.optim, name)(m.parameters())))(
                sparse_model()
            ),
            "not element-wise",
        )
    for bad in ([model()], [nn.Linear(3, 3)], ["x"], "x", 3, [None]):
        refused(f"{k} followers {bad!r:.20}", lambda kind=kind, bad=bad: rule(kind, followers=bad), "follower")
    refused(f"{k} of a dense model", lambda kind=kind: rule(kind, model()), "no sparse layer|sparse")
    refused(
        f"{k} model None",
        lambda kind=kind: kind(
            None, torch.optim.SGD(model().parameters(), 0.1), **({"end_step": 9} if kind is sk.GMP else {})
        ),
        "model",
    )
for kind in (sk.SET, sk.RigL):
    for bad in (-0.1, 1.5, float("nan"), "0.3", None, True):
        refused(
            f"{kind.__name__} drop_fraction {bad!r}",
            lambda kind=kind, bad=bad: rule(kind, drop_fraction=bad),
            "drop_fraction|fraction",
        )
    for bad in (-1, 2**64, 1.5, "0", None):
        refused(f"{kind.__name__} seed {bad!r}", lambda kind=kind, bad=bad: rule(kind, seed=bad), "seed")
    refused(
        f"{kind.__name__} cosine without an end",
        lambda kind=kind: rule(kind, drop_fraction=sk.cosine(0.3)),
        "needs an end_step",
    )
for bad in (0, -0.1, 1.5, float("nan"), "0.1", None):
    refused(f"GMP final_density {bad!r}", lambda bad=bad: rule(sk.GMP, final_density=bad), "density")
for bad in ("all", None, 3):
    refused(f"GMP scope {bad!r}", lambda bad=bad: rule(sk.GMP, scope=bad), "scope")
for bad in (-0.1, 1.5, float("nan"), "0.3", None):
    refused(f"cosine {bad!r}", lambda bad=bad: sk.cosine(bad), "fraction|cosine")
for name, mask in (("short", torch.ones(2, dtype=torch.bool)), ("float", torch.ones(40, 24)), ("None", None)):
    refused(
        f"reset_state mask {name}",
        lambda mask=mask: (lambda m: sk.reset_state(torch.optim.Adam(m.parameters()), m, mask))(layer()),
        "mask",
    )


def outcome(call: Call) -> str:
    """In a child: "" if the call ends as it should, else what is wrong."""
    signal.alarm(SECONDS)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.run()
    except (ValueError, TypeError, RuntimeError) as error:
        if call.refused is None:
            return f"refused: {type(error).__name__}: {error}"
        if re.search(call.refused, str(error)):
            return ""
        return f"no sentence of ours: {type(error).__name__}: {error}"
    except BaseException as error:
        return f"no sentence: {type(error).__name__}: {error}"
    return "" if call.refused is None else "accepted without a word"


def in_child(call: Call) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writing, outcome(call)[:2000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return said if status == 0 else f"crashed: {signal.Signals(os.WTERMSIG(status)).name}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = [(call.name, in_child(call)) for call in CALLS]
    json.dump({"calls": len(found), "faults": [pair for pair in found if pair[1]]}, sys.stdout, indent=1)
