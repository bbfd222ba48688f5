"""Conversions of layers and models."""

import torch
from torch import nn

import sparsekern as sk

from . import layer, model, refused, sparse_model, works

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
