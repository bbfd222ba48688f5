"""Checkpoints, coordinates that are written in place, pickles."""

import copy

import torch

import sparsekern as sk

from . import layer, refused

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
