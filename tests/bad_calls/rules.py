"""Rules, schedules, optimiser state."""

import torch
from torch import nn

import sparsekern as sk

from . import layer, model, refused, sparse_model

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
        refused(
            f"{k} update_every {bad!r}", lambda kind=kind, bad=bad: rule(kind, update_every=bad), "update_every", bad
        )
    for bad in (float("nan"), float("inf"), "3", None):
        refused(f"{k} start_step {bad!r}", lambda kind=kind, bad=bad: rule(kind, start_step=bad), "start_step", bad)
    for bad in (float("nan"), float("inf"), "3", -5):
        refused(f"{k} end_step {bad!r}", lambda kind=kind, bad=bad: rule(kind, end_step=bad), "end_step", bad)
    for bad in (float("nan"), float("inf"), "3"):
        refused(f"{k} clock {bad!r}", lambda kind=kind, bad=bad: rule(kind).step(clock=bad), "clock", bad)
    refused(
        f"{k} clock back", lambda kind=kind: (lambda r: (r.step(clock=5), r.step(clock=4)))(rule(kind)), "backwards"
    )
    for bad in (None, "adam", 3, []):
        refused(
            f"{k} optimizer {bad!r}",
            lambda kind=kind, bad=bad: kind(sparse_model(), bad, **({"end_step": 9} if kind is sk.GMP else {})),
            "optimizer",
            bad,
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
        refused(f"{k} followers {bad!r:.20}", lambda kind=kind, bad=bad: rule(kind, followers=bad), "follower", bad)
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
            bad,
        )
    for bad in (-1, 2**64, 1.5, "0", None):
        refused(f"{kind.__name__} seed {bad!r}", lambda kind=kind, bad=bad: rule(kind, seed=bad), "seed", bad)
    refused(
        f"{kind.__name__} cosine without an end",
        lambda kind=kind: rule(kind, drop_fraction=sk.cosine(0.3)),
        "needs an end_step",
    )
for bad in (0, -0.1, 1.5, float("nan"), "0.1", None):
    refused(f"GMP final_density {bad!r}", lambda bad=bad: rule(sk.GMP, final_density=bad), "density", bad)
for bad in ("all", None, 3):
    refused(f"GMP scope {bad!r}", lambda bad=bad: rule(sk.GMP, scope=bad), "scope", bad)
for bad in (-0.1, 1.5, float("nan"), "0.3", None):
    refused(f"cosine {bad!r}", lambda bad=bad: sk.cosine(bad), "fraction|cosine", bad)
for name, mask in (("short", torch.ones(2, dtype=torch.bool)), ("float", torch.ones(40, 24)), ("None", None)):
    refused(
        f"reset_state mask {name}",
        lambda mask=mask: (lambda m: sk.reset_state(torch.optim.Adam(m.parameters()), m, mask))(layer()),
        "mask",
    )
