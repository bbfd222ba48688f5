"""Checkpoints, coordinates that are written in place, pickles."""

import copy
import io
import pickle

import torch
from torch import nn

import sparsekern as sk

from . import LAYERS, close, layer, refused, works

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

# The same for every kind of layer, also with assign=True; and what becomes of a layer that refused.


def conv() -> sk.SparseConv2d:
    return sk.SparseConv2d(4, 8, 3, density=0.5, block_size=4)


COORDINATES = ("block_rows", "block_cols")
MAKE = {kind: (lambda kind=kind: layer(kind)) for kind in LAYERS} | {"conv": conv}


def adopt(make, change, **options):
    """Load a changed checkpoint; a refusal leaves the layer as it was."""
    source, target = make(), make()
    before = copy.deepcopy(target.state_dict())
    state = source.state_dict()
    state |= change(source, state)
    try:
        target.load_state_dict(state, **options)
    except Exception:
        for name, value in target.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} changed"
        raise


for kind in ("block 8", "block 1", "groups", "conv"):
    make = MAKE[kind]
    for name, change, sentence in (
        ("rows float", lambda m, s: {T + "block_rows": s[T + "block_rows"].double()}, "block_rows must be .*float64"),
        ("cols bool", lambda m, s: {T + "block_cols": s[T + "block_cols"] > 0}, "block_cols must be .*bool"),
        ("rows a list", lambda m, s: {T + "block_rows": s[T + "block_rows"].tolist()}, "block_rows must be .*list"),
        ("cols None", lambda m, s: {T + "block_cols": None}, "block_cols must be .*NoneType"),
        ("rows of two axes", lambda m, s: {T + "block_rows": s[T + "block_rows"][None]}, "one length"),
        ("cols far outside", lambda m, s: {T + "block_cols": s[T + "block_cols"].long() + 2**33}, "outside"),
        ("cols negative", lambda m, s: {T + "block_cols": s[T + "block_cols"] - 99}, "outside"),
        ("first twice", lambda m, s: {T + n: s[T + n][:1].expand_as(s[T + n]) for n in COORDINATES}, "two slots"),
        ("rows on meta", lambda m, s: {T + n: s[T + n].to("meta") for n in COORDINATES}, "meta"),
        ("geometry a text", lambda m, s: {T + "_extra_state": "40 x 24"}, "5 integers"),
        ("geometry a dict", lambda m, s: {T + "_extra_state": {}}, "5 integers"),
        ("geometry of groups", lambda m, s: {T + "_extra_state": s[T + "_extra_state"] * 3}, "the checkpoint's"),
        ("weight of bool", lambda m, s: {"weight": s["weight"] > 0}, "real numbers, got torch.bool"),
        ("weight a list", lambda m, s: {"weight": s["weight"].tolist()}, "real numbers, got list"),
        ("weight None", lambda m, s: {"weight": None}, "weight must be|no weight"),
        ("weight longer", lambda m, s: {"weight": torch.cat(2 * [s["weight"]])}, "slots, its topology"),
        ("weight flat", lambda m, s: {"weight": s["weight"].flatten()}, "must have shape"),
        ("weight of 0 slots", lambda m, s: {"weight": s["weight"][:0]}, "has 0 slots"),
        ("weight sparse", lambda m, s: {"weight": s["weight"].to_sparse()}, "dense"),
        ("bias complex", lambda m, s: {"bias": s["bias"] * 1j}, "bias must be .*complex64"),
        ("bias of int64", lambda m, s: {"bias": s["bias"].long()}, "bias must be .*int64"),
        ("bias shorter", lambda m, s: {"bias": s["bias"][1:]}, "bias"),
        ("bias a list", lambda m, s: {"bias": s["bias"].tolist()}, "bias"),
    ):
        for options in ({}, {"assign": True}, {"strict": False}) if kind == "block 8" else ({},):
            said = "".join(f", {key}={value}" for key, value in options.items())
            refused(f"{kind}: load {name}{said}", lambda m=make, c=change, o=options: adopt(m, c, **o), sentence)
    for bad in (None, 3, "state.pt", [1]):
        refused(f"{kind}: load {bad!r}", lambda m=make, bad=bad: m().load_state_dict(bad), "state_dict", bad)
    works(f"{kind}: load of float64", lambda m=make: adopted(m, lambda s: {"weight": s["weight"].double()}))
    works(
        f"{kind}: load of int64 coordinates",
        lambda m=make: adopted(m, lambda s: {T + n: s[T + n].long() for n in COORDINATES}),
    )
    works(
        f"{kind}: load of a strided weight",
        lambda m=make: adopted(m, lambda s: {"weight": torch.stack(2 * [s["weight"]], -1)[..., 0]}),
    )
    works(f"{kind}: pickled", lambda m=make: same_function(pickle.loads(pickle.dumps(o := m())), o))
    works(f"{kind}: copied", lambda m=make: same_function(copy.deepcopy(o := m()), o))
    works(f"{kind}: copied flat", lambda m=make: same_function(copy.copy(o := m()), o))
    works(f"{kind}: written and pickled", lambda m=make: written_and_pickled(m))
    works(f"{kind}: saved and read", lambda m=make: saved_and_read(m))


def operand(m: nn.Module) -> torch.Tensor:
    return torch.randn(2, 4, 6, 6) if isinstance(m, sk.SparseConv2d) else torch.randn(5, 24)


def dense(m: nn.Module) -> nn.Module:
    return m.to_conv2d() if isinstance(m, sk.SparseConv2d) else m.to_linear()


def same_function(m: nn.Module, other: nn.Module) -> None:
    x = operand(m)
    close(m(x), dense(other)(x))


def adopted(make, change) -> None:
    source, target = make(), make()
    state = source.state_dict()
    target.load_state_dict(state | change(state))
    same_function(target, source)
    target(operand(target)).sum().backward()


def written_and_pickled(make) -> None:
    m, other = make(), make()
    with torch.no_grad():
        for name in COORDINATES:
            getattr(m.topology, name).copy_(getattr(other.topology, name))
        m.weight.copy_(other.weight)
        m.bias.copy_(other.bias)
    same_function(pickle.loads(pickle.dumps(m)), other)


def saved_and_read(make) -> None:
    m, other = make(), make()
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_function(other, m)


for kind in ("block 8", "block 1", "groups", "conv"):
    for how in ("outside", "negative"):
        refused(
            f"{kind}: rebuild of coordinates {how}",
            lambda m=MAKE[kind], h=how: nonsense(m(), h).topology.rebuild(),
            "outside the .* blocks",
        )

# Coordinates that are written in place, read by everything that reads them.


def nonsense(m: nn.Module, how: str) -> nn.Module:
    t = m.topology
    with torch.no_grad():
        if how == "outside":
            t.block_rows.fill_(30000)
            t.block_cols.fill_(30000)
        elif how == "negative":
            t.block_rows.fill_(-7)
        elif how == "twice":
            t.block_rows.fill_(0)
            t.block_cols.fill_(0)
        elif how == "shorter":
            t.block_rows.resize_(1)
            t.block_cols.resize_(1)
        elif how == "float":
            t.block_rows = t.block_rows.float()
    return m


HOW = {
    "outside": "outside",
    "negative": "outside",
    "twice": "two slots",
    "shorter": "slots|index|one length|shape",
    "float": "must be a tensor of integers, got torch.float32",
}
READ = {
    "forward": lambda m: m(operand(m)),
    "forward with gradients": lambda m: m(operand(m).requires_grad_()).sum().backward(),
    "reset_parameters": lambda m: m.reset_parameters(),
    "to_dense": lambda m: m.to_dense(),
    "to_bsr": lambda m: m.to_bsr(),
    "to_scipy": lambda m: m.to_scipy(),
    "set_density": lambda m: m.set_density(0.3),
    "init_": lambda m: sk.init_(m, nn.init.xavier_uniform_),
    "mask": lambda m: m.topology.mask(),
    "pickle": pickle.dumps,
    "densify": sk.densify,
    "SET": lambda m: sk.SET(m, torch.optim.SGD(m.parameters(), 0.1)),
    "RigL": lambda m: sk.RigL(m, torch.optim.SGD(m.parameters(), 0.1)),
    "GMP": lambda m: sk.GMP(m, torch.optim.SGD(m.parameters(), 0.1), end_step=9),
    "sparsify": lambda m: sk.sparsify(m, 0.3),
}
for how, sentence in HOW.items():
    for name, read in READ.items():
        for kind in ("block 8", "block 1", "conv") if name == "forward" else ("block 8",):
            refused(
                f"{kind}: {name} of coordinates {how}",
                lambda m=MAKE[kind], h=how, r=read: r(nonsense(m(), h)),
                sentence,
            )


# An index that somebody wrote is built anew; kernels would have followed it out of their memory.


def index_written(m: nn.Module, change) -> None:
    with torch.no_grad():
        change(m.topology)
    x = operand(m).requires_grad_()
    y = m(x)
    close(y, dense(m)(x))
    y.sum().backward()
    close(x.grad, torch.autograd.grad(dense(m)(x).sum(), x)[0])


for kind, make in MAKE.items():
    for name, change in (
        ("of huge numbers", lambda t: t.index.fill_(10**8)),
        ("of negative numbers", lambda t: t.index.fill_(-3)),
        ("of zeros", lambda t: t.index.zero_()),
        ("in reverse", lambda t: t.index.copy_(t.index.flip(0))),
    ):
        works(f"{kind}: an index {name}", lambda m=make, c=change: index_written(m(), c))
    refused(
        f"{kind}: an index written between forward and backward",
        lambda m=make: (lambda m, x: (lambda y: (m.topology.index.zero_(), y.sum().backward()))(m(x)))(
            m(), torch.randn(2, 4, 6, 6) if m is conv else torch.randn(5, 24)
        ),
        "backward: the topology",
    )
    for name, change, sentence in (
        ("an index of another size", lambda t: setattr(t, "index", torch.zeros(3).int()), "want an index"),
        ("an index of float32", lambda t: setattr(t, "index", t.index.float()), "want an index"),
        ("fewer rows", lambda t: setattr(t, "block_rows", t.block_rows[:-1]), "one length|slots|wants a weight"),
        ("rows of bool", lambda t: setattr(t, "block_rows", t.block_rows > 0), "integers, got torch.bool"),
        ("cols complex", lambda t: setattr(t, "block_cols", t.block_cols * 1j), "integers, got torch.complex"),
        ("cols outside", lambda t: setattr(t, "block_cols", t.block_cols + 5000), "outside"),
    ):
        refused(
            f"{kind}: {name} in its place",
            lambda m=make, c=change: (lambda m: (c(m.topology), m(operand(m))))(m()),
            sentence,
        )
    for bad in ([0], None, 0, torch.tensor(0), torch.tensor([0.0]), torch.tensor([True]), torch.tensor([[0]])):
        refused(
            f"{kind}: keep_slots {bad!r}",
            lambda m=make, bad=bad: m().topology.keep_slots(bad),
            "keep_slots: slots must be integers .any., got",
        )
    for bad in ([10**6], [-1]):
        refused(
            f"{kind}: keep_slots {bad!r}",
            lambda m=make, bad=bad: m().topology.keep_slots(torch.tensor(bad)),
            "keep_slots: slots must be from 0 to",
            bad[0],
        )
    refused(f"{kind}: keep_slots twice", lambda m=make: m().topology.keep_slots(torch.tensor([0, 0])), "in two slots")
