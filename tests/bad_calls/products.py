"""Group ids, token offsets, the products and the registered operators called directly, backends."""

import torch
from torch import nn

import sparsekern as sk

from . import close, layer, refused, works

NO_INTEGERS = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
NO_INTEGERS = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)

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
    refused(f"use {bad!r}", lambda bad=bad: with_backend(bad, lambda: None), "backend .* is unknown", bad)
refused(
    "use cpu, float64",
    lambda: with_backend("cpu", lambda: layer().double()(torch.randn(5, 24).double())),
    "takes float32",
)
refused(
    "use cpu, float16", lambda: with_backend("cpu", lambda: layer().half()(torch.randn(5, 24).half())), "takes float32"
)
refused("use triton", lambda: with_backend("triton", lambda: layer()(torch.randn(5, 24))), "backend 'triton'")
