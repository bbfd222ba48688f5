"""Rules, schedules, optimiser state."""

import copy

import torch
from torch import nn

import sparsekern as sk
from sparsekern.rewire.growth import pack
from sparsekern.rewire.optimizer_state import element_state

from . import layer, model, refused, sparse_model, works

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

# What a rule is told later: clocks, schedules, scores and states.

KINDS = {"SET": sk.SET, "RigL": sk.RigL, "GMP": sk.GMP}


def trained(kind=sk.SET, block_size: int = 8, **options):
    """A rule whose next step is an event."""
    made = sk.sparsify(model(), density=1.0 if kind is sk.GMP else 0.4, block_size=block_size)
    made_rule = rule(kind, made, **options)
    for _ in range(2):
        made(torch.randn(5, 24)).sum().backward()
        made_rule.optimizer.step()
    return made_rule


def resumed(kind, change) -> None:
    other = trained(kind)
    other.step()
    state, own = other.state_dict(), trained(kind)
    before = own.state_dict()
    change(state)
    try:
        own.load_state_dict(state)
    except Exception:
        assert own.state_dict() == before, "the rule changed"
        raise


for k, kind in KINDS.items():
    for bad in (torch.tensor(3.0), [1], {}, True, 1j, -1.0):
        refused(f"{k} clock {bad!r}", lambda kind=kind, bad=bad: trained(kind).step(clock=bad), "clock", bad)
    for bad in ("yes", 1, None):
        if kind is not sk.GMP:
            refused(f"{k} coverage {bad!r}", lambda kind=kind, bad=bad: rule(kind, coverage=bad), "coverage", bad)
    for name in ("update_every", "start_step", "end_step"):
        for bad in (True, [1], torch.tensor(3.0), 1j, "3"):
            refused(f"{k} {name} {bad!r}", lambda kind=kind, n=name, bad=bad: rule(kind, **{n: bad}), name, bad)
    refused(f"{k} ends before its start", lambda kind=kind: rule(kind, start_step=9, end_step=3), "before start_step")
    for bad in (None, 3, "state", [1], {}):
        refused(f"{k} state {bad!r}", lambda kind=kind, bad=bad: trained(kind).load_state_dict(bad), "no state of a")
    for key, values in (
        ("clock", (None, "3", float("nan"), -1.0, [1])),
        ("events", (None, "3", -1, 0.5)),
        ("next", (None, "3", -1, 0.5)),
        ("moved", (None, 3, {}, {"0": 1, "2": 1}, {"0": (1, 2), "2": "no"})),
    ):
        for bad in values:
            refused(
                f"{k} state {key} {bad!r}",
                lambda kind=kind, n=key, bad=bad: resumed(kind, lambda s: s.update({n: bad})),
                key if key != "moved" else "moved|layers",
            )
    follower = sparse_model()
    refused(
        f"{k} followers of another topology",
        lambda kind=kind: rule(kind, followers=[sparse_model()]),
        "another topology",
    )
    refused(
        f"{k} follows itself",
        lambda kind=kind: (lambda m: rule(kind, m, followers=[m]))(sparse_model()),
        "copy.deepcopy",
    )
    refused(
        f"{k} followers twice",
        lambda kind=kind: (lambda m, f: rule(kind, m, followers=[f, f]))(m := sparse_model(), copy.deepcopy(m)),
        "once",
    )
    for bad in ("model", 3, torch.randn(3), nn.Linear, [nn.Linear(3, 3)]):
        refused(
            f"{k} model {bad!r:.20}",
            lambda kind=kind, bad=bad: rule(kind, bad, torch.optim.SGD(model().parameters(), 0.1)),
            "model must be",
        )
    refused(
        f"{k} after set_density between two steps",
        lambda kind=kind: (
            lambda r: (r.layers["0"].set_density(0.2), list(element_state(r._optimizers, r.layers["0"].weight)))
        )(trained(kind)),
        "slots, but the weight has",
    )
    refused(
        f"{k} after set_density",
        lambda kind=kind: (lambda r: (r.step(), r.layers["0"].set_density(0.2), r.step()))(trained(kind)),
        "optimiser still holds the state",
    )
    # Muon takes no blocks, so it cannot hold one
    for name, sentence in (("Muon", "does not hold the weight"), ("SparseAdam", "not element-wise")):
        if hasattr(torch.optim, name):
            refused(
                f"{k} {name}",
                lambda kind=kind, n=name: (lambda m: rule(kind, m, by_name(n, m)))(sparse_model()),
                sentence,
            )
    refused(
        f"{k} of a normed weight",
        lambda kind=kind: rule(kind, nn.Sequential(nn.utils.parametrizations.weight_norm(layer()))),
        "computed anew|does not hold",
    )


def by_name(name: str, m: nn.Module) -> torch.optim.Optimizer:
    matrices = [nn.Parameter(torch.randn(4, 4))] if name == "Muon" else list(m.parameters())
    return getattr(torch.optim, name)(matrices)


class Told(sk.DropAndGrow):
    """A rule that says what it is told."""

    drop = grow = None

    def drop_scores(self, layer):
        return torch.zeros(layer.topology.num_slots) if self.drop is None else self.drop(layer)

    def grow_scores(self, layer):
        return None if self.grow is None else self.grow(layer)


def told(block_size: int = 8, **functions) -> None:
    made = trained(Told, block_size)
    for name, function in functions.items():
        setattr(made, name, function)
    before = copy.deepcopy({path: m.state_dict() for path, m in made.layers.items()})
    try:
        made.step()
    except Exception:
        for path, m in made.layers.items():
            assert all(torch.equal(value, before[path][name]) for name, value in m.state_dict().items()), (
                f"{path} changed"
            )
        raise


def keys(m, place: int):
    count = m.topology.num_slots
    return pack(torch.ones(1, count).long(), torch.full((1, count), place))


for block_size in (8, 1):
    for name, functions, sentence in (
        ("drop None", {"drop": lambda m: "no"}, "drop_scores: layer '0' wants floating-point scores .* got str"),
        ("drop short", {"drop": lambda m: torch.zeros(2)}, r"drop_scores: layer '0' wants .* got torch.float32 \(2,\)"),
        ("drop int", {"drop": lambda m: torch.zeros(m.topology.num_slots).int()}, "drop_scores.*int32"),
        ("drop complex", {"drop": lambda m: torch.zeros(m.topology.num_slots) * 1j}, "drop_scores.*complex64"),
        ("drop on meta", {"drop": lambda m: torch.zeros(m.topology.num_slots, device="meta")}, "drop_scores.*meta"),
        ("grow a text", {"grow": lambda m: "no"}, "grow_scores: layer '0' wants floating-point scores .* got str"),
        ("grow short", {"grow": lambda m: torch.zeros(2)}, "grow_scores: layer '0' wants"),
        ("grow bool", {"grow": lambda m: torch.zeros(1, *m.topology.grid) > 0}, "grow_scores.*bool"),
        ("grow on meta", {"grow": lambda m: torch.zeros(1, *m.topology.grid, device="meta")}, "grow_scores.*meta"),
        ("keys of places beyond", {"grow": lambda m: keys(m, 2**31)}, "grow_scores: layer '0' wants int64 keys"),
        ("keys just beyond", {"grow": lambda m: keys(m, m.topology.num_blocks)}, "grow_scores: layer '0' wants int64"),
        ("keys too few", {"grow": lambda m: keys(m, 0)[:, :0]}, "grow_scores: layer '0' wants int64 keys"),
        ("keys flat", {"grow": lambda m: keys(m, 0)[0]}, "grow_scores: layer '0' wants int64 keys"),
        ("drop fraction nan", {"drop_fraction": lambda progress: float("nan")}, "drop_fraction must be .*nan"),
        ("drop fraction 2", {"drop_fraction": lambda progress: 2.0}, "drop_fraction must be .*2.0"),
        ("drop fraction None", {"drop_fraction": lambda progress: None}, "drop_fraction must be .*None"),
        ("drop fraction a text", {"drop_fraction": lambda progress: "0.3"}, "drop_fraction must be .*'0.3'"),
        (
            "drop fraction a tensor",
            {"drop_fraction": lambda progress: torch.tensor(0.3)},
            "drop_fraction must be .*tensor",
        ),
    ):
        refused(f"a rule of blocks of {block_size}: {name}", lambda b=block_size, f=functions: told(b, **f), sentence)
refused("a rule that does not say where", lambda: trained(sk.DropAndGrow).step(), "override grow_scores")
for bad in (True, [0.3], torch.tensor(0.3), -1e-9, 1.0001, float("inf"), "cosine"):
    refused(f"cosine {bad!r}", lambda bad=bad: sk.cosine(bad), "drop_fraction", bad)
    refused(f"SET drop_fraction {bad!r}", lambda bad=bad: rule(sk.SET, drop_fraction=bad), "drop_fraction", bad)
for bad in (True, [0.1], torch.tensor(0.1), float("inf"), 1.0001):
    refused(f"GMP final_density {bad!r}", lambda bad=bad: rule(sk.GMP, final_density=bad), "final_density|density", bad)
for bad in ("yes", 1, None):
    refused(f"GMP compact {bad!r}", lambda bad=bad: rule(sk.GMP, compact=bad), "compact", bad)
for bad in (["layer"], {"layer": 1}, ""):
    refused(f"GMP scope {bad!r}", lambda bad=bad: rule(sk.GMP, scope=bad), "scope", bad)
refused("GMP without an end", lambda: sk.GMP(m := sparse_model(), torch.optim.SGD(m.parameters(), 0.1)), "end_step")
for bad in (True, float("nan"), [1], torch.tensor(3), -1):
    refused(f"SET seed {bad!r}", lambda bad=bad: rule(sk.SET, seed=bad), "seed", bad)
for bad in (None, 3, "model", nn.Linear(3, 3), torch.randn(3)):
    refused(f"Static of {bad!r:.20}", lambda bad=bad: sk.Static(bad), "Static: (model must be|the model has no sparse)")


def reset(change) -> None:
    m = layer()
    optimizer = torch.optim.Adam(m.parameters())
    m(torch.randn(5, 24)).sum().backward()
    optimizer.step()
    arguments = {"optimizer": optimizer, "layer": m, "mask": torch.ones(40, 24, dtype=torch.bool)}
    sk.reset_state(**arguments | change)


for name, change, sentence in (
    ("optimizer None", {"optimizer": None}, "optimizer must be .*NoneType"),
    ("optimizer a text", {"optimizer": "adam"}, "optimizer must be .*str"),
    ("optimizer []", {"optimizer": []}, "optimizer is an empty list"),
    ("optimizer of others", {"optimizer": torch.optim.Adam(model().parameters())}, "does not hold this parameter"),
    ("layer None", {"layer": None}, "layer must be .*None"),
    ("layer a number", {"layer": 3}, "layer must be .*3"),
    ("layer without a weight", {"layer": nn.ReLU()}, "layer must be .*ReLU"),
    ("layer a tensor", {"layer": torch.randn(3)}, "layer must be"),
    ("mask transposed", {"mask": torch.ones(24, 40, dtype=torch.bool)}, r"mask must fit .*\(24, 40\)"),
    ("mask of five axes", {"mask": torch.ones(1, 1, 1, 40, 24, dtype=torch.bool)}, "mask must fit"),
    ("mask int", {"mask": torch.ones(40, 24, dtype=torch.int64)}, "mask must be .*int64"),
    ("mask a list", {"mask": [True]}, "mask must be .*list"),
    ("mask a bool", {"mask": True}, "mask must be .*bool"),
    ("mask on meta", {"mask": torch.ones(40, 24, dtype=torch.bool, device="meta")}, "mask .*meta"),
    ("mask sparse", {"mask": torch.ones(40, 24, dtype=torch.bool).to_sparse()}, "mask"),
):
    refused(f"reset_state {name}", lambda change=change: reset(change), sentence)

for k, kind in KINDS.items():
    for bad in (None, 3, {}, {"0": [0.0], "2": ["x"]}, {"0": [0.0], "2": []}, {"0": [float("nan")], "2": [0.0]}):
        if kind is not sk.GMP:
            refused(
                f"{k} state carry {bad!r}", lambda kind=kind, b=bad: resumed(kind, lambda s: s.update(carry=b)), "carry"
            )
for bad in (None, "yes", 1):
    refused(f"RigL state armed {bad!r}", lambda b=bad: resumed(sk.RigL, lambda s: s.update(armed=b)), "armed", bad)
    refused(f"GMP state done {bad!r}", lambda b=bad: resumed(sk.GMP, lambda s: s.update(done=b)), "done", bad)
for bad in (None, "3", -1, 0.5):
    refused(
        f"GMP state compactions {bad!r}",
        lambda b=bad: resumed(sk.GMP, lambda s: s.update(compactions=b)),
        "compactions",
        bad,
    )
for bad in (None, 3, {}, {"0": [1], "2": ["x"]}, {"0": [1], "2": []}, {"0": [-1], "2": [1]}):
    refused(f"GMP state initial {bad!r}", lambda b=bad: resumed(sk.GMP, lambda s: s.update(initial=b)), "initial")
works("SET state carry of rounding", lambda: resumed(sk.SET, lambda s: s.update(carry={"0": [-1e-10], "2": [0.9]})))
refused("SET state carry -2", lambda: resumed(sk.SET, lambda s: s.update(carry={"0": [-2.0], "2": [0.9]})), "carry")


# What became of the model, its followers and the optimiser since the rule was made.


def later(kind, change, **options) -> None:
    """An event after a change; a refusal leaves the layers as they were."""
    made = sk.sparsify(model(), density=1.0 if kind is sk.GMP else 0.4, block_size=8)
    follower = copy.deepcopy(made)
    r = rule(kind, made, followers=[follower], **options)
    for _ in range(2):
        made(torch.randn(5, 24)).sum().backward()
        r.optimizer.step()
    change(r, made, follower)
    before = copy.deepcopy([m.state_dict() for m in (made, follower)])
    try:
        for _ in range(3):
            r.step()
    except Exception:
        for m, state in zip((made, follower), before, strict=True):
            assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items()), "a layer changed"
        raise


def backwards(t: sk.Topology) -> None:
    t.replace(t.block_rows.flip(0), t.block_cols.flip(0))


def fresh(weight: nn.Parameter, **options) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(weight, **options))


STATE = "exp_avg"
for k, kind in KINDS.items():
    for name, change, sentence in (
        ("the weight replaced", lambda r, m, f: setattr(m[0], "weight", fresh(m[0].weight)), "another parameter than"),
        ("the weight gone", lambda r, m, f: m[0].register_parameter("weight", None), "another parameter than"),
        (
            "the weight shorter",
            lambda r, m, f: setattr(m[0].weight, "data", m[0].weight.data[1:]),
            "slots, but its top",
        ),
        (
            "the follower's shorter",
            lambda r, m, f: setattr(f[0].weight, "data", f[0].weight.data[1:]),
            "slots, but its",
        ),
        ("the follower's slots in reverse", lambda r, m, f: backwards(f[0].topology), "follower no longer has"),
        ("the follower sparser", lambda r, m, f: f[2].set_density(0.2), "layer '2' of a follower no longer has"),
        ("state on meta", lambda r, m, f: moved_state(r, STATE, lambda s: s.to("meta")), f"keeps '{STATE}' on meta"),
        ("state complex", lambda r, m, f: moved_state(r, STATE, lambda s: s * 1j), f"keeps '{STATE}' as .*complex64"),
        ("state of int64", lambda r, m, f: moved_state(r, STATE, lambda s: s.long()), f"keeps '{STATE}' as .*int64"),
        ("state flat", lambda r, m, f: moved_state(r, STATE, lambda s: s.flatten()), f"keeps '{STATE}' as"),
        ("state sums", lambda r, m, f: moved_state(r, STATE, lambda s: s.sum((1, 2))), f"keeps '{STATE}' as"),
        ("state in a list", lambda r, m, f: moved_state(r, STATE, lambda s: [s]), f"keeps '{STATE}' as list"),
        ("coordinates outside", lambda r, m, f: m[0].topology.block_rows.fill_(9000), "outside|no longer has"),
        ("the follower's outside", lambda r, m, f: f[0].topology.block_rows.fill_(9000), "outside|no longer has"),
    ):
        refused(f"{k}: later {name}", lambda kind=kind, c=change: later(kind, c), sentence)
    works(f"{k}: nothing later", lambda kind=kind: later(kind, lambda r, m, f: None))
    works(
        f"{k}: the follower loaded later",
        lambda kind=kind: later(kind, lambda r, m, f: f.load_state_dict(m.state_dict())),
    )
    for bad in (-1, -0.5, -1e9):
        refused(f"{k} start_step {bad!r}", lambda kind=kind, bad=bad: rule(kind, start_step=bad), "start_step", bad)
    for name, bad in (("seeds", {"seeds": 1}), ("density", {"density": 0.3}), ("lr", {"lr": 1})):
        refused(f"{k} of an unknown {name}", lambda kind=kind, bad=bad: rule(kind, **bad), f"keyword argument '{name}'")
    for bad in ({"a": model()}, nn.Linear, [nn.Linear], [sparse_model(), None], 3.0, True):
        refused(f"{k} followers {bad!r:.30}", lambda kind=kind, bad=bad: rule(kind, followers=bad), "follower")
    if kind is not sk.GMP:
        for name, change in (
            ("a number", lambda s: 3),
            ("None", lambda s: None),
            ("empty", lambda s: {}),
            ("of other layers", lambda s: {"1": s["0"]}),
            ("a list of layers", lambda s: list(s.values())),
            ("of numbers", lambda s: dict.fromkeys(s, 1)),
            ("of other shapes", lambda s: {path: mask[0] for path, mask in s.items()}),
            ("of float32", lambda s: {path: mask.float() for path, mask in s.items()}),
        ):
            refused(f"{k} state covered {name}", lambda kind=kind, c=change: covered(kind, c), "covered")


def moved_state(r, name: str, change) -> None:
    state = r.optimizer.state[r.layers["0"].weight]
    state[name] = change(state[name])


def covered(kind, change) -> None:
    r = rule(kind, coverage=True)
    state = r.state_dict()
    state["covered"] = change(state["covered"])
    before = r.stats()
    try:
        r.load_state_dict(state)
    except Exception:
        assert r.stats() == before, "the rule changed"
        raise


for schedule in (sk.cosine(0.3),):
    for bad in ("x", None, [0.5], float("nan"), float("inf"), torch.tensor(0.5), 1j, True):
        refused(f"{schedule} at {bad!r}", lambda s=schedule, bad=bad: s(bad), "cosine: progress must be", bad)
