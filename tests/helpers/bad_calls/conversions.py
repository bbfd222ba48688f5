"""Conversions of layers and models."""

import copy

import torch
from torch import nn

import sparsekern as sk

from . import close, layer, model, refused, sparse_model, works

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
    refused(f"set_density {bad!r}", lambda bad=bad: layer("groups").set_density(bad), "density", bad)
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
for bad in ({}, {"weight": torch.randn(3)}):
    refused(f"plan_from {bad!r:.20}", lambda bad=bad: sk.plan_from(bad), "holds no sparse layer")
    refused(f"load {bad!r:.20}", lambda bad=bad: sk.load(model(), bad), "holds no sparse layer")
for bad in (None, 3, "model.pt", [1]):
    refused(f"plan_from {bad!r:.20}", lambda bad=bad: sk.plan_from(bad), "plan_from", bad)
    refused(f"load {bad!r:.20}", lambda bad=bad: sk.load(model(), bad), "load|plan_from", bad)
refused(
    "load of another model",
    lambda: sk.load(nn.Sequential(nn.Linear(8, 8)), sparse_model().state_dict()),
    "plan has|shape",
)

# Layers by themselves, and saved models.

for kind in ("block 8", "block 1", "full", "padded", "groups"):
    for bad in (0, -1.0, 1.0001, float("nan"), "0.3", None, True, 2, [], [0.3, 0.3, 0.3], {"*": 0.3}):
        refused(f"{kind}: set_density {bad!r}", lambda kind=kind, bad=bad: unchanged(layer(kind), bad), "density", bad)
    for name, mask in (
        ("on meta", torch.ones(40, 24, dtype=torch.bool, device="meta")),
        ("complex", torch.ones(40, 24, dtype=torch.complex64)),
        ("int", torch.ones(40, 24, dtype=torch.int64)),
        ("a list", [[True] * 24] * 40),
        ("of three axes", torch.ones(3, 40, 24, dtype=torch.bool)),
        ("empty", torch.zeros(0, dtype=torch.bool)),
    ):
        refused(f"{kind}: keep {name}", lambda kind=kind, mask=mask: unchanged(layer(kind), 0.3, mask), "keep")
    works(f"{kind}: to_scipy", lambda kind=kind: (lambda m: close(as_tensor(m.to_scipy()), m.to_dense()))(layer(kind)))
    if kind != "padded":
        works(f"{kind}: to_bsr", lambda kind=kind: (lambda m: close(m.to_bsr().to_dense(), m.to_dense()))(layer(kind)))
    refused(f"{kind}: to_cupy", lambda kind=kind: layer(kind).to_cupy(), "cupy is not installed")
    for name in ("to_bsr", "to_scipy"):
        if (kind, name) != ("padded", "to_bsr"):
            refused(f"{kind}: {name} on meta", lambda k=kind, n=name: getattr(layer(k).to("meta"), n)(), "meta")
for name, function in (
    ("that returns a tensor", lambda w: torch.ones_like(w)),
    ("of text", "xavier_uniform_"),
):
    refused(f"init_ by a function {name}", lambda f=function: sk.init_(layer(), f), "init_: function|got an unexpected")
for bad in (None, 3, "layer", torch.randn(3), [1]):
    refused(f"init_ of {bad!r:.20}", lambda bad=bad: sk.init_(bad, nn.init.zeros_), "layer must be", bad)
for bad in (0, 3, 256, None, "8", True, [8]):
    refused(
        f"from_conv2d block_size {bad!r}",
        lambda bad=bad: sk.SparseConv2d.from_conv2d(nn.Conv2d(4, 8, 3), block_size=bad),
        "block_size must be",
        bad,
    )
for bad in (0, 1.5, float("nan"), None, "0.3", [0.3, 0.3]):
    refused(
        f"from_conv2d density {bad!r}",
        lambda bad=bad: sk.SparseConv2d.from_conv2d(nn.Conv2d(4, 8, 3), density=bad, block_size=4),
        "density",
        bad,
    )
for bad in (nn.LazyLinear(3), nn.Conv1d(3, 3, 3), nn.Embedding(3, 3), nn.Linear, "linear", torch.randn(3, 3)):
    refused(f"from_linear of {bad!r:.20}", lambda bad=bad: sk.SparseLinear.from_linear(bad), "nn.Linear|lazy")
refused(
    "from_linear of complex numbers",
    lambda: sk.SparseLinear.from_linear(nn.Linear(24, 40, dtype=torch.complex64)),
    "dtype must be .*complex64",
)
refused("plan of a lazy layer", lambda: sk.plan(nn.Sequential(nn.LazyLinear(3))), "lazy")
for name, options, sentence in (
    ("keep {}", {"keep": {}}, "keep"),
    ("keep without a pattern that fits", {"keep": {"head": "fresh"}}, "no pattern of keep fits layer '0'"),
    ("keep of numbers", {"keep": {3: "fresh"}}, "keep"),
    ("keep of a bad word", {"keep": {"*": "best"}}, "keep must be .*'best'"),
    ("keep a list", {"keep": ["fresh"]}, "keep must be"),
    ("a list of densities", {"density": [0.1, 0.2]}, "density must be"),
    ("a list of block sizes", {"block_size": [8, 8]}, "block_size must be"),
    ("densities of texts", {"density": {"*": "0.1"}}, "density must be .*'0.1'"),
    ("block sizes of None", {"block_size": {"*": None}}, "block_size must be .*None"),
    ("a list of distributions", {"distribution": ["erk"]}, "distribution must be"),
    ("modules nested", {"modules": [[nn.Linear]]}, "modules may hold"),
    ("modules an instance", {"modules": nn.Linear(3, 3)}, "modules may hold"),
    ("optimizer of another model", {"optimizer": torch.optim.SGD(model().parameters(), 0.1)}, "does not hold"),
    ("optimizer numbers", {"optimizer": [1, 2]}, "optimizer must be .*int"),
    ("optimizer of another kind", {"optimizer": nn.Linear(3, 3)}, "optimizer must be .*Linear"),
    ("a plan of another model", {"density": sk.plan(nn.Sequential(nn.Linear(64, 64)))}, "layer '0' has shape"),
    ("a plan of more layers", {"density": sk.plan(nn.Sequential(*[nn.Linear(32, 32)] * 9))}, "layer|shape"),
):
    refused(f"sparsify {name}", lambda o=options: all_or_nothing(o), sentence)
for name, change, sentence in (
    ("no coordinates", lambda s: s.pop("0.topology.block_rows"), "block_rows"),
    ("geometry short", lambda s: s.update({"0.topology._extra_state": torch.tensor([32, 24])}), "5 integers"),
    ("geometry a text", lambda s: s.update({"0.topology._extra_state": "32 x 24"}), "5 integers"),
    ("geometry None", lambda s: s.update({"0.topology._extra_state": None}), "5 integers"),
    ("geometry float", lambda s: s.update({"0.topology._extra_state": torch.ones(5)}), "5 integers"),
    ("geometry zero", lambda s: s.update({"0.topology._extra_state": torch.zeros(5).long()}), "must be"),
    ("geometry negative", lambda s: s.update({"0.topology._extra_state": -torch.ones(5).long()}), "must be"),
    ("rows outside", lambda s: s["0.topology.block_rows"].fill_(99), "outside"),
    ("rows twice", lambda s: (s["0.topology.block_rows"].fill_(0), s["0.topology.block_cols"].fill_(0)), "two slots"),
    ("rows float", lambda s: s.update({"0.topology.block_rows": torch.ones(3)}), "integers"),
    ("rows None", lambda s: s.update({"0.topology.block_rows": None}), "integers|block_rows"),
    ("a number among the keys", lambda s: s.update({3: torch.ones(3)}), "state_dict|key"),
):
    for made in ("plan_from", "load"):
        refused(f"{made}: {name}", lambda made=made, c=change: from_saved(made, c), sentence)
for bad in ("adam", 3, [], [1], {}, nn.Linear(3, 3)):
    refused(f"summary optimizer {bad!r:.20}", lambda bad=bad: sk.summary(sparse_model(), bad), "optimizer must be")


def as_tensor(matrix) -> torch.Tensor:
    return torch.from_numpy(matrix.toarray())


def unchanged(m: sk.SparseLinear, *arguments) -> None:
    """set_density, which leaves the layer as it was where it refuses."""
    before = copy.deepcopy(m.state_dict())
    try:
        m.set_density(*arguments)
    except Exception:
        assert all(torch.equal(value, before[name]) for name, value in m.state_dict().items()), "the layer changed"
        raise


def all_or_nothing(options: dict) -> None:
    made = model()
    before = list(made)
    try:
        sk.sparsify(made, **{"density": 0.3, "block_size": 8} | options)
    except Exception:
        assert list(made) == before, "the model changed"
        raise


def from_saved(made: str, change) -> None:
    state = copy.deepcopy(dict(sparse_model().state_dict()))
    change(state)
    return sk.plan_from(state) if made == "plan_from" else sk.load(model(), state)
