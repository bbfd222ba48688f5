"""Group ids, token offsets, the products and the registered operators called directly, backends."""

import re

import torch
from torch import nn

import sparsekern as sk

from . import LAYERS, close, layer, refused, works

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
    ("more rows than the index", {"num_rows": 500}, "num_rows"),
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

# Operators called directly with offsets and operands that native code would follow.


def operator(name: str, kind: str, offsets=None, **tensors):
    m = layer(kind)
    t = m.topology
    groups = t.groups if offsets is not None else 1
    rows, cols = (n * t.block_size // groups for n in t.grid)
    o = {"x": torch.randn(5, cols), "dy": torch.randn(5, rows), "weight": m.weight.detach(), "bias": None} | tensors
    if name == "sdd":
        return torch.ops.sparsekern.sdd(o["dy"], o["x"], offsets, *t.layout)
    if name == "dds":
        return torch.ops.sparsekern.dds(o["x"], o["weight"], o["bias"], offsets, *t.layout, True)
    if name == "dds transposed":
        return torch.ops.sparsekern.dds(o["dy"], o["weight"], o["bias"], offsets, *t.layout, False)
    shape = (t.groups, t.grid[0] // t.groups, t.grid[1] // t.groups)
    scores = torch.full(shape, -1.0) if t.block_size > 1 else torch.full((t.groups, 9), -1)
    scores, armed = tensors.get("scores", scores), tensors.get("armed", torch.tensor(True))
    return torch.ops.sparsekern.score_growth(o["dy"], o["x"], offsets, *t.layout, armed, scores)


for name in ("dds", "dds transposed", "sdd", "score_growth"):
    for backend, kinds in (("reference", ("groups",)), (None, ("groups", "groups of block 1"))):
        for kind in kinds:
            for what, offsets in (
                ("falling", [0, 6, 5]),
                ("negative", [0, -2, 5]),
                ("beyond", [0, 2, 60000]),
                ("short of the end", [0, 2, 4]),
                ("not from 0", [3, 3, 5]),
            ):
                refused(
                    f"{name} by {backend}, {kind}: offsets {what}",
                    lambda n=name, b=backend, k=kind, o=offsets: forced(b, lambda: operator(n, k, torch.tensor(o))),
                    f"token_offsets must rise from 0 to 5, the number of tokens, got {re.escape(str(offsets))}",
                )
    refused(
        f"{name}: offsets of float32",
        lambda n=name: operator(n, "groups", torch.tensor([0.0, 2, 5])),
        "token_offsets must be int32 or int64",
    )
    refused(
        f"{name}: strided offsets too short",
        lambda n=name: operator(n, "groups", torch.tensor([0, 5])),
        "token_offsets must be int32 or int64",
    )
    for dtype in (torch.int64, torch.complex64, torch.bool):
        refused(
            f"{name}: operands of {dtype}",
            lambda n=name, d=dtype: operator(
                n, "block 8", x=torch.ones(5, 24).to(d), dy=torch.ones(5, 40).to(d), weight=torch.ones(6, 8, 8).to(d)
            ),
            f"{name.split()[0]}: .* must be real floating-point numbers, got {dtype}",
        )
    if name != "dds":
        refused(
            f"{name}: dy too narrow", lambda n=name: operator(n, "block 8", dy=torch.randn(5, 8)), "must be .tokens, 40"
        )
    if name != "dds transposed":
        refused(
            f"{name}: x too narrow", lambda n=name: operator(n, "block 8", x=torch.randn(5, 8)), "must be .tokens, 24"
        )
for name in ("dds", "dds transposed", "sdd"):
    for bad in ("weight", "x", "dy"):
        if bad in {"dds": ("x", "weight"), "dds transposed": ("dy", "weight"), "sdd": ("dy", "x")}[name]:
            refused(
                f"{name}: {bad} on meta",
                lambda n=name, b=bad: operator(n, "block 8", **{b: like(b).to("meta")}),
                "one device|on meta",
            )
for kind in ("block 8", "block 1"):
    for what, change, sentence in (
        ("x of fewer tokens", {"x": torch.randn(4, 24)}, "tokens"),
        ("scores too small", {"scores": torch.zeros(1)}, "scores must be"),
        ("scores of int32", {"scores": torch.zeros(1, 5, 3, dtype=torch.int32)}, "scores must be"),
        ("scores on meta", {"scores": torch.zeros(1, 5, 3, device="meta")}, "one device"),
        ("armed on meta", {"armed": torch.tensor(True, device="meta")}, "one device"),
        ("armed of two", {"armed": torch.tensor([True, False])}, "armed must be"),
    ):
        refused(f"score_growth, {kind}: {what}", lambda k=kind, c=change: operator("score_growth", k, **c), sentence)
refused("dds: bias of the operator too short", lambda: operator("dds", "block 8", bias=torch.randn(3)), "bias must be")
refused(
    "dds transposed: a bias",
    lambda: operator("dds transposed", "block 8", bias=torch.randn(40)),
    "bias belongs to x W",
)


def like(what: str) -> torch.Tensor:
    return {"x": torch.randn(5, 24), "dy": torch.randn(5, 40), "weight": layer().weight.detach()}[what]


def forced(backend: str | None, run):
    if backend is None:
        return run()
    with sk.use(backend):
        return run()


for bad in (["cpu"], {"cpu": 1}, b"cpu", torch.tensor(1)):
    refused(f"use {bad!r}", lambda bad=bad: with_backend(bad, lambda: None), "backend .* is unknown")


def use_comes_back():
    from sparsekern import choose

    with sk.use("reference"):
        for inner in ("abacus", "cpu"):
            try:
                with sk.use(inner):
                    raise RuntimeError("inside")
            except (ValueError, RuntimeError):
                pass
            assert choose.forced() is choose.BACKENDS["reference"]
    assert choose.forced() is None


works("use inside of use", use_comes_back)
for backend in ("reference", "dense", "cpu"):
    for kind in ("block 8", "block 1", "full", "padded", "groups"):
        works(
            f"{kind} by {backend}",
            lambda b=backend, k=kind: with_backend(
                b, lambda: (lambda m, x: close(m(x), m.to_linear()(x)))(layer(k), torch.randn(5, 24))
            ),
        )

t = sk.Topology.random((40, 24), 0.4, 8)
for name, change, sentence in (
    ("dy a list", {"dy": [[1.0]]}, "dy must be a tensor, got list"),
    ("x None", {"x": None}, "x must be a tensor, got NoneType"),
    ("topology None", {"topology": None}, "topology must be a sparsekern.Topology, got NoneType"),
    ("topology a layer", {"topology": nn.Linear(3, 3)}, "topology must be a sparsekern.Topology, got Linear"),
    ("dy too wide", {"dy": torch.randn(5, 41)}, r"wants 40 features in the last axis, got \(5, 41\)"),
    ("x too wide", {"x": torch.randn(5, 25)}, r"wants 24 features in the last axis, got \(5, 25\)"),
    ("fewer tokens", {"dy": torch.randn(4, 40)}, r"dy has \(4,\) tokens, but x has \(5,\)"),
    ("dy of float64", {"dy": torch.randn(5, 40).double()}, "one dtype, got torch.float64"),
    ("dy on meta", {"dy": torch.randn(5, 40, device="meta")}, "one device"),
    ("dy of int64", {"dy": torch.ones(5, 40).long()}, "floating-point numbers, got torch.int64"),
    ("dy complex", {"dy": torch.ones(5, 40) * 1j}, "floating-point numbers, got torch.complex64"),
    ("dy sparse", {"dy": torch.randn(5, 40).to_sparse()}, "dy must be dense, got torch.sparse_coo"),
    ("offsets None of a list", {"token_offsets": [0, 5]}, "token_offsets must be a tensor, got list"),
    ("offsets of one group, falling", {"token_offsets": torch.tensor([5, 0])}, "must rise from 0 to 5"),
):
    refused(
        f"sdd: {name}",
        lambda c=change: sk.sdd(**{"dy": torch.randn(5, 40), "x": torch.randn(5, 24), "topology": t} | c),
        sentence,
    )
for name, change, sentence in (
    ("x on meta", {"x": torch.randn(5, 24, device="meta")}, "one device, got meta and cpu"),
    ("weight on meta", {"weight": torch.randn(6, 8, 8, device="meta")}, "one device, got cpu and meta"),
    ("bias on meta", {"bias": torch.randn(40, device="meta")}, "one device, got cpu and meta"),
    ("bias a list", {"bias": [0.0] * 40}, "bias must be a tensor, got list"),
    ("bias a number", {"bias": 1.0}, "bias must be a tensor, got float"),
    ("weight sparse", {"weight": torch.randn(6, 8, 8).to_sparse()}, "weight must be dense, got torch.sparse_coo"),
    ("bias complex", {"bias": torch.randn(40) * 1j}, "one dtype"),
    ("growth a number", {"growth": 3, "weight": nn.Parameter(torch.randn(6, 8, 8))}, "growth must have .*watch.*int"),
):
    refused(f"dds {name}", lambda c=change: product(c), sentence)
works("sdd: no tokens", lambda: sk.sdd(torch.randn(0, 40), torch.randn(0, 24), t).count_nonzero() == 0 or 1 / 0)
for name, x, ids, sentence in (
    ("of x with all features", torch.randn(5, 24), IDS, r"wants 12 features \(of one group\)"),
    ("of x on meta", torch.randn(5, 12, device="meta"), IDS, "x is on meta, but the group ids are on cpu"),
    ("of x of float64", torch.randn(5, 12).double(), IDS, "one dtype, got torch.float64"),
    ("of x of int64", torch.ones(5, 12).long(), IDS, "floating-point numbers, got torch.int64"),
    ("of x a list", [[1.0]], IDS, "x must be a tensor, got list"),
    ("of x None", None, IDS, "x must be a tensor, got NoneType"),
    ("of a number", torch.randn(5, 12), 1, "group must be a tensor"),
    ("without tokens", torch.randn(0, 12), [1], "one id per token"),
):
    refused(
        f"group ids {name}",
        lambda x=x, ids=ids: layer("groups")(x, group=torch.tensor(ids) if isinstance(ids, list) else ids),
        sentence,
    )
works("group ids of two axes", lambda: ids_of_axes((2, 3)))
works("group ids of a single token", lambda: ids_of_axes(()))
works("group ids of no tokens", lambda: ids_of_axes((0,)))


def ids_of_axes(axes: tuple[int, ...]) -> None:
    heads, x, ids = layer("groups"), torch.randn(*axes, 12), torch.randint(2, axes)
    y, w, b = heads(x, group=ids), heads.to_dense(), heads.bias.view(2, 20)
    blocks = torch.stack([w[:20, :12], w[20:, 12:]])[ids]
    close(y, (blocks @ x[..., None]).squeeze(-1) + b[ids])
    y.sum().backward()


# Autocast does not cut an imaginary part off, and makes no numbers out of integers; nn.Linear refuses them too.


def autocast(run):
    with torch.autocast("cpu", torch.bfloat16):
        return run()


for kind in LAYERS:
    for dtype in (torch.complex64, torch.int64, torch.bool, torch.uint8):
        x, dy = torch.ones(5, 24).to(dtype), torch.ones(5, 40).to(dtype)
        refused(
            f"autocast, {kind}: x of {dtype}",
            lambda k=kind, x=x: autocast(lambda: layer(k)(x)),
            f"dds: operands must be real floating-point numbers, got {dtype}|one dtype, got .*{dtype}",
        )
        refused(
            f"autocast, {kind}: sdd of {dtype}",
            lambda k=kind, x=x, dy=dy: autocast(lambda: sk.sdd(dy, x, layer(k).topology)),
            f"sdd: operands must be real floating-point numbers, got {dtype}",
        )
    refused(
        f"autocast, {kind}: a complex weight",
        lambda k=kind: autocast(
            lambda: sk.dds(torch.ones(5, 24), (m := layer(k)).weight * 1j, m.topology, transpose=True)
        ),
        "one dtype, got torch.bfloat16 and torch.complex64",
    )
    works(f"autocast, {kind}: float32", lambda k=kind: autocast(lambda: in_bfloat16(layer(k), torch.randn(5, 24))))
    works(
        f"autocast, {kind}: float16", lambda k=kind: autocast(lambda: in_bfloat16(layer(k), torch.randn(5, 24).half()))
    )


def in_bfloat16(m, x) -> None:
    y = m(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, m.to_linear()(x), rtol=2e-2, atol=2e-2)


def of_parts(m, x) -> None:
    y = m(torch.nested.nested_tensor([x[:2], x[2:]]))
    torch.testing.assert_close(torch.cat(y.unbind()), m.to_linear()(x), rtol=1e-4, atol=1e-4)


for bad in (None, 2, -1, "yes", [], 0.5, torch.tensor([1, 0])):
    refused(f"dds transpose {bad!r}", lambda bad=bad: product(transpose=bad, bias=None), "transpose must be", bad)
for kind in ("block 8", "block 1", "full", "padded"):
    for name, change, sentence in (
        ("sparse by rows", lambda x: x.to_sparse_csr(), "x must be dense, got torch.sparse_csr"),
        ("of MKL-DNN", lambda x: x.to_mkldnn(), "x must be dense, got torch._mkldnn|x must have rows whose elements"),
        ("quantised", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "numbers, got torch.quint8"),
        ("of float8", lambda x: x.to(torch.float8_e4m3fn), "one dtype, got torch.float8_e4m3fn"),
    ):
        refused(f"{kind}: x {name}", lambda k=kind, c=change: layer(k)(c(torch.randn(5, 24))), sentence)
    works(f"{kind}: x nested", lambda k=kind: of_parts(layer(k), torch.randn(5, 24)))
    for name in ("weight", "bias"):
        refused(
            f"{kind}: a sparse {name}",
            lambda k=kind, n=name: (
                lambda m: (setattr(m, n, nn.Parameter(getattr(m, n).detach().to_sparse())), m(torch.randn(5, 24)))
            )(layer(k)),
            f"{name} must be dense, got torch.sparse_coo",
        )
        for what, bad in (("a number", 3.0), ("a list", [1.0]), ("a text", "x")):
            refused(
                f"{kind}: {name} {what}",
                lambda k=kind, n=name, bad=bad: (
                    lambda m: sk.dds(
                        **{"x": torch.randn(5, 24), "weight": m.weight, "topology": m.topology, "transpose": True}
                        | {n: bad}
                    )
                )(layer(k)),
                f"{name} must be a tensor",
                bad,
            )
