"""Rules whose events go through the kernels of csrc/cuda/rewire.cu: what a rule by torch operations does, bit for bit.

The kernels run by their emulation on a CPU; on a GPU (marker gpu) the same cases run on the device itself.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from emulation import Launches
from oracle import random_topology
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk
from sparsekern.backends import cuda
from sparsekern.rewire import device_rule, on_device
from sparsekern.rewire.on_device import Growth, ModelTables, takes_gradient

EVENTS = 4


class Middle(sk.DropAndGrow):
    """Drops the strongest blocks, grows in the middle of the matrix."""

    def drop_scores(self, layer):
        return -layer.weight.detach().float().abs().sum((1, 2))

    def grow_scores(self, layer):
        row, col = (torch.linspace(-1, 1, n // layer.groups) for n in layer.topology.grid)
        return (2 - row[:, None].abs() - col.abs()).expand(layer.groups, -1, -1).to(layer.weight.device)


class Narrow(Middle):
    """Grows in the upper rows only, where places run out."""

    def grow_scores(self, layer):
        scores = super().grow_scores(layer).clone()
        scores[:, 2:] = -1
        return scores


class Ragged(nn.Module):
    """A padded trunk of blocks of 4, and heads of single weights in three groups."""

    in_features = 30

    def __init__(self):
        super().__init__()
        self.trunk = sk.SparseLinear(30, 42, density=0.3, block_size=4)
        self.heads = sk.SparseLinear(42, 3 * 7, density=0.25, block_size=1, groups=3)

    def forward(self, x):
        return self.heads(self.trunk(x).relu())


class BesideFull(nn.Sequential):
    """A layer that ERK leaves dense, and another whose pruned blocks may grow again, beside a sparse one."""

    in_features = 28

    def __init__(self):
        dense, pruned = (sk.SparseLinear(32, 32, density=1.0, block_size=size) for size in (1, 4))
        super().__init__(sk.SparseLinear(28, 32, density=0.3, block_size=4), dense, pruned)
        dead = torch.arange(64) % 3 == 0
        pruned.topology.mark_dead(dead)
        with torch.no_grad():
            pruned.weight[dead] = 0


def layer_of(grid, block_size, groups=1, live=0.4, dead=0) -> nn.Module:
    topology = random_topology(grid, block_size, groups, live, dead)
    return sk.SparseLinear(*topology.shape[::-1], topology=topology)


class Mixed(Ragged):
    """Blocks of several sizes, full stores among them."""

    def __init__(self, density=1.0):
        super().__init__()
        self.trunk = sk.SparseLinear(30, 42, density=density, block_size=4)
        self.heads = sk.SparseLinear(42, 3 * 7, density=density, block_size=2, groups=3)
        self.last = sk.SparseLinear(21, 16, density=density, block_size=8)

    def forward(self, x):
        return self.last(super().forward(x).relu())


def gmp(**options) -> Callable:
    """A rule that prunes until the last event."""

    def make(model, optimizer, update_every, followers, coverage):
        options_of_all = {"final_density": 0.1, "end_step": EVENTS, "compact": False} | options
        return sk.GMP(model, optimizer, update_every=update_every, followers=followers, **options_of_all)

    return make


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    rule: Callable
    optimizer: Callable = torch.optim.Adam
    followers: int = 0


CASES = {
    "SET": Case(Ragged, sk.SET),
    "SET, all that it can": Case(partial(layer_of, (6, 7), 2, live=0.8), partial(sk.SET, drop_fraction=1.0)),
    "SET, few blocks": Case(partial(layer_of, (3, 3), 8, live=0.4), partial(sk.SET, drop_fraction=0.2)),
    "SET, groups and dead slots": Case(partial(layer_of, (6, 7), 4, groups=3, dead=5), sk.SET),
    "SET, followers": Case(Ragged, sk.SET, followers=2),
    "SET, full stores": Case(BesideFull, sk.SET, followers=1),
    "RigL, full stores": Case(BesideFull, sk.RigL),
    "SET, Adagrad": Case(Ragged, sk.SET, partial(torch.optim.Adagrad, initial_accumulator_value=0.25)),
    "RigL, block 16": Case(partial(layer_of, (6, 7), 16), sk.RigL),
    "RigL, block 1": Case(partial(layer_of, (20, 30), 1, live=0.2), sk.RigL),
    "RigL, both and followers": Case(Ragged, sk.RigL, followers=1),
    "a rule of its own": Case(Ragged, Middle, followers=1),
    "a rule whose places run out": Case(Ragged, partial(Narrow, drop_fraction=0.9), followers=1),
}
PRUNING = {
    f"GMP, {scope}, {name}": Case(*case)
    for scope in ("layer", "global")
    for name, case in {
        "all kinds of blocks": (Mixed, gmp(scope=scope)),
        "followers and Adagrad": (
            Ragged,
            gmp(scope=scope, final_density=0.04),
            partial(torch.optim.Adagrad, initial_accumulator_value=0.25),
            2,
        ),
        "groups and dead slots": (partial(layer_of, (6, 7), 4, groups=3, dead=5), gmp(scope=scope)),
        "to nothing": (partial(Mixed, 0.5), gmp(scope=scope, final_density=1e-9)),
        "compacted": (Mixed, gmp(scope=scope, compact=True, final_density=0.3), torch.optim.Adam, 1),
        "sparser already": (partial(Mixed, 0.2), gmp(scope=scope, final_density=0.6)),
    }.items()
}
CASES |= PRUNING


def results(model: nn.Module, copies: list[nn.Module], optimizer, rule) -> dict[str, Tensor]:
    """Everything that an event may change."""
    found = {f"weight {i}": weight.detach() for i, weight in enumerate(model.parameters())}
    found |= {f"gradient {i}": w.grad for i, w in enumerate(model.parameters()) if w.grad is not None}
    for i, weight in enumerate(model.parameters()):
        found |= {f"{name} {i}": value for name, value in optimizer.state[weight].items()}
    for number, one in enumerate([model, *copies]):
        for path, layer in rule.layers.items():
            layer = one.get_submodule(path)
            found |= {f"{path}: weight of copy {number}": layer.weight.detach()}
            names = ("block_rows", "block_cols", "index")
            found |= {f"{path}: {name} of copy {number}": getattr(layer.topology, name) for name in names}
    return {name: value.cpu().clone() for name, value in found.items()}


def train(
    case: Case, events: int = EVENTS, device: str = "cpu", rewiring=nullcontext, change: Callable | None = None
) -> list[dict]:
    """What there is after each event, which is inside of `rewiring()`; a training step comes before it.

    `change(model, optimizer, copies)` comes before the event in the middle.
    """
    torch.manual_seed(3)
    model = case.model()
    inputs = torch.randn(events, 5, model.in_features).to(device)
    gradients = [[torch.randn(weight.shape) for weight in model.parameters()] for _ in inputs]
    model = model.to(device)
    copies = [copy.deepcopy(model) for _ in range(case.followers)]
    optimizer = case.optimizer(model.parameters(), 0.1)
    rule = case.rule(model, optimizer, update_every=1, followers=copies, coverage=True)
    found = []
    for x, given in zip(inputs, gradients, strict=True):
        optimizer.zero_grad()
        model(x).square().sum().backward()  # for the scores of RigL
        for weight, gradient in zip(model.parameters(), given, strict=True):
            weight.grad.copy_(
                gradient[: len(weight)]
            )  # a GPU may sum those of the backward in another order every time
        optimizer.step()
        with torch.no_grad():
            for weight in model.parameters():  # norms are exact then, in whatever order they are summed
                weight.mul_(1024).round_().div_(1024)
            for one in copies:
                for weight in one.parameters():
                    weight.mul_(0.5)
        if change is not None and len(found) == events // 2:
            with torch.no_grad():
                change(model, optimizer, copies)
        with rewiring():
            changed = rule.step()
        if isinstance(rule, sk.GMP):
            rule._settle(wait=True)  # a GPU compacts when its counts have arrived, be it a step later
        found.append(results(model, copies, optimizer, rule) | {"changed": changed, "stats": rule.stats()})
        found[-1]["state"] = {name: value for name, value in rule.state_dict().items() if name != "covered"}
    return found


@pytest.fixture
def forced(monkeypatch) -> Callable[[], Launches]:
    """Called, it lets the kernels' emulation answer events of layers on the CPU; by a table they are not forced."""

    def force(run: bool = True, by_table: bool = False) -> Launches:
        launches = Launches(monkeypatch, run)
        wanted = SimpleNamespace(rewires_by_cuda=lambda device: True, forced=lambda: None if by_table else cuda)
        monkeypatch.setattr(device_rule, "choose", wanted)
        return launches

    return force


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    for event, (own, expected) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in expected.items():
            same = torch.equal(own[name], value) if isinstance(value, Tensor) else own[name] == value
            assert same, f"event {event}: {name} differs"


@pytest.mark.parametrize("name", CASES)
def test_events_by_the_kernels_are_those_by_torch_bit_for_bit(forced, name):
    theirs = train(CASES[name])
    launches = forced(by_table=True)
    assert_equal(train(CASES[name]), theirs)
    kernels = [kernel for kernel in cuda.KERNELS["rewire"] if kernel != "rank" or "global" not in name]
    assert launches.names == EVENTS * kernels and any(event["changed"] for event in theirs)


def renew_memory(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def renew_state(model, optimizer, copies):
    for weight in model.parameters():
        optimizer.state[weight] = {name: value.clone() for name, value in optimizer.state[weight].items()}


def renew_coordinates(model, optimizer, copies):
    for layer in (model.trunk, copies[0].trunk):
        layer.topology.replace(layer.topology.block_rows.clone(), layer.topology.block_cols.clone())


def renew_parameter(model, optimizer, copies):
    """Another parameter in the same memory."""
    old, new = model.trunk.weight, nn.Parameter(model.trunk.weight.data)
    new.grad, model.trunk.weight = old.grad, new
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.state[new] = optimizer.state.pop(old)


def swap_slots(model, optimizer, copies):
    """Written in place: the same blocks in other slots."""
    for one in (model, *copies):
        for coordinates in (one.trunk.topology.block_rows, one.trunk.topology.block_cols):
            coordinates.copy_(coordinates.flip(0))


CHANGES = {
    "a weight's memory": lambda model, optimizer, copies: renew_memory(model.trunk.weight),
    "a weight's storage": lambda model, optimizer, copies: model.heads.weight.set_(model.heads.weight.clone()),
    "a parameter, not its memory": renew_parameter,
    "a gradient": lambda model, optimizer, copies: setattr(model.trunk.weight, "grad", model.trunk.weight.grad.clone()),
    "no gradient": lambda model, optimizer, copies: setattr(model.trunk.weight, "grad", None),
    "a follower's memory": lambda model, optimizer, copies: renew_memory(copies[0].trunk.weight),
    "a tensor of the state": lambda model, optimizer, copies: renew_memory(
        next(value for value in optimizer.state[model.trunk.weight].values() if value.dim() == 3)
    ),
    "the state": renew_state,
    "the state by load_state_dict": lambda model, optimizer, copies: optimizer.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    ),
    "the weights by load_state_dict": lambda model, optimizer, copies: model.load_state_dict(
        copy.deepcopy(model.state_dict())
    ),
    "the model by to": lambda model, optimizer, copies: model.double().float(),
    "the coordinates' storage": renew_coordinates,
    "a topology": lambda model, optimizer, copies: setattr(
        model.heads, "topology", copy.deepcopy(model.heads.topology)
    ),
    "coordinates by themselves": lambda model, optimizer, copies: model.trunk.topology.block_rows.add_(0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["SET, followers", "RigL, both and followers", "GMP, layer, followers and Adagrad"])
def test_what_is_replaced_between_two_events_is_rewired_as_by_torch(forced, kind, name):
    theirs = train(CASES[kind], change=CHANGES[name])
    forced()
    assert_equal(train(CASES[kind], change=CHANGES[name]), theirs)


def unaligned(tensor: Tensor) -> Tensor:
    """A copy at an address that is no multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


def unalign_state(model, optimizer, copies):
    state = optimizer.state[model.heads.weight]
    for name, value in state.items():
        if value.dim() == 3:
            state[name] = unaligned(value)


REFUSED = {
    "a gradient, once": (
        lambda model, *_: setattr(model.trunk.weight, "grad", unaligned(model.trunk.weight.grad)),
        0,
        EVENTS - 1,
    ),
    "the state, from then on": (unalign_state, 0, EVENTS // 2),
    "more copies than the kernels hold": (None, on_device.MAX_COPIES, 0),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["SET, followers", "RigL, both and followers", "GMP, global, followers and Adagrad"])
def test_what_the_kernels_refuse_is_rewired_by_torch_where_nobody_forces_them(forced, kind, name):
    change, followers, by_kernels = REFUSED[name]
    case = replace(CASES[kind], followers=max(followers, CASES[kind].followers))
    theirs = train(case, change=change)
    launches = forced(by_table=True)
    assert_equal(train(case, change=change), theirs)
    assert launches.names.count("score") == by_kernels


def test_gradients_that_the_kernels_take_lie_as_the_weight_does():
    weight = torch.zeros(4, 2, 2)
    assert all(takes_gradient(gradient, weight) for gradient in (None, torch.zeros(4, 2, 2)))
    refused = [weight.double(), weight.to_sparse(), unaligned(weight), torch.zeros(4, 2, 4)[..., ::2]]
    assert not any(takes_gradient(gradient, weight) for gradient in refused)


def test_what_was_prepared_is_let_go_when_torch_takes_over(forced):
    forced(by_table=True)
    model, optimizer, rule = trained_rule()
    assert step(model, optimizer, rule) and rule._prepared is not None
    unalign_state(model, optimizer, [])
    assert step(model, optimizer, rule) and rule._prepared is None


def test_several_ranks_rewire_alike_by_torch_where_nobody_forces_the_kernels(forced, monkeypatch):
    launches = forced(by_table=True)
    monkeypatch.setattr(device_rule, "distributed", lambda: True)
    model, optimizer, rule = trained_rule()
    assert step(model, optimizer, rule) and not launches.names


@pytest.mark.parametrize("by_kernels", [False, True])
def test_blocks_that_were_put_into_other_slots_are_refused_with_the_state_of_the_old_ones(forced, by_kernels):
    if by_kernels:
        forced()
    with pytest.raises(RuntimeError, match="weights of another topology were loaded into trunk, but the optimiser"):
        train(CASES["SET, followers"], change=swap_slots)


@pytest.mark.parametrize("name", [name for name in PRUNING if "already" not in name])
def test_the_cases_of_gmp_prune_more_than_once(name):
    dropped = [sum(stats["dropped"] for stats in event["stats"].values()) for event in train(CASES[name])]
    assert sum(map(bool, dropped)) > 1, "else the case shows little"


def test_a_rule_whose_places_run_out_keeps_some_blocks():
    last = train(CASES["a rule whose places run out"])[0]
    assert all(0 < stats["dropped"] < 0.9 * stats["live"] - 1 for stats in last["stats"].values()), (
        "else the case shows nothing"
    )


class Operations(TorchDispatchMode):
    """The names of the torch operations inside that would be a launch on a GPU."""

    VIEWS = ("empty", "slice", "select", "unbind", "detach", "view", "expand", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


RULES = {
    "SET": sk.SET,
    "RigL": sk.RigL,
    "GMP, layer": partial(sk.GMP, scope="layer", end_step=100, compact=False),
    "GMP, global": partial(sk.GMP, scope="global", end_step=100, compact=False),
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("layers", [1, 28])
def test_an_event_of_a_whole_model_takes_at_most_eight_launches(forced, monkeypatch, kind, layers):
    model = nn.Sequential(*(sk.SparseLinear(64, 64, density=0.3, block_size=16) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters())
    rule = RULES[kind](model, optimizer, update_every=1)
    launches, uploads, operations = forced(run=False), [], Operations()
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    assert rule.step()  # which builds the tables
    launches.names.clear()
    upload = on_device._upload

    def counted(*arguments):
        uploads.append(arguments)
        with torch.utils._python_dispatch._disable_current_modes():
            return upload(*arguments)

    monkeypatch.setattr(on_device, "_upload", counted)
    downloads, is_pruned = [], kind.startswith("GMP")
    of_all = kind == "GMP, global"
    if is_pruned:
        monkeypatch.setattr(rule, "_send", downloads.append)
        event = 0.5, Growth.MARK_DEAD_OF_ALL if of_all else Growth.MARK_DEAD
    else:
        event = rule.layers, rule._counts(0.3)[0]
    with operations, torch.no_grad():
        rule._event_on_device(*event)
    assert launches.names == [kernel for kernel in cuda.KERNELS["rewire"] if kernel != "rank" or not of_all]
    assert operations.names == ["zero_"] and len(uploads) == 1 and len(downloads) == of_all
    assert len(launches.names) + len(operations.names) + len(uploads) + len(downloads) <= 8


def trained_rule(kind=sk.SET, **arguments):
    model = Ragged()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    return model, optimizer, kind(model, optimizer, update_every=1, **arguments)


def step(model, optimizer, rule) -> bool:
    optimizer.zero_grad()
    model(torch.randn(5, model.in_features)).square().sum().backward()
    optimizer.step()
    return rule.step()


def test_tables_are_built_once_and_anew_when_a_tensor_has_moved(forced, monkeypatch):
    forced()
    built = []
    monkeypatch.setattr(on_device, "ModelTables", lambda *args: built.append(args) or ModelTables(*args))
    model, optimizer, rule = trained_rule()
    for _ in range(3):
        assert step(model, optimizer, rule)
    assert len(built) == 1
    changes = {
        "state": lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        "weight": lambda: model.trunk.weight.set_(model.trunk.weight.detach().clone()),
        "topology": lambda: model.heads.topology.replace(
            model.heads.topology.block_rows.clone(), model.heads.topology.block_cols.clone()
        ),
    }
    for number, (name, change) in enumerate(changes.items()):
        with torch.no_grad():
            change()
        assert step(model, optimizer, rule)
        assert len(built) == number + 2, name
        for layer in (model.trunk, model.heads):
            t = layer.topology
            assert torch.equal(sk.Topology(t.block_rows, t.block_cols, t.shape, t.block_size, t.groups).index, t.index)


@pytest.mark.parametrize("kind", [sk.SET, partial(sk.GMP, final_density=0.05, end_step=4)], ids=["SET", "GMP"])
def test_a_follower_that_is_assigned_between_two_events_is_rewired_by_the_kernels_too(forced, kind):
    forced()
    model, optimizer, rule = trained_rule(kind)
    assert step(model, optimizer, rule) and step(model, optimizer, rule)
    follower = copy.deepcopy(model)
    rule.followers = [follower]
    assert step(model, optimizer, rule)
    for path, layer in rule.layers.items():
        own = follower.get_submodule(path).topology
        assert own.is_at(*layer.topology.layout.coordinates()) and torch.equal(own.index, layer.topology.index)


@pytest.mark.parametrize("kind", [sk.SET, partial(sk.GMP, final_density=0.05, end_step=4)], ids=["SET", "GMP"])
def test_an_optimizer_that_is_assigned_between_two_events_is_reset_by_the_kernels_too(forced, kind):
    forced()
    model, optimizer, rule = trained_rule(kind)
    assert step(model, optimizer, rule) and step(model, optimizer, rule)
    rule.optimizer = second = torch.optim.Adam(model.parameters())
    before = {path: layer.topology.layout.positions() for path, layer in rule.layers.items()}
    assert step(model, second, rule)
    for path, layer in rule.layers.items():
        moved, averages = before[path] != layer.topology.layout.positions(), second.state[layer.weight]["exp_avg"]
        assert moved.any() and not averages[moved].any() and averages[~moved].any()


def test_torch_is_told_of_what_is_written_to_a_parameter_that_took_over_the_memory_of_another(forced):
    forced()
    model, optimizer, rule = trained_rule()
    step(model, optimizer, rule)
    renew_parameter(model, optimizer, [])
    before = model.trunk.weight._version
    assert rule.step() and model.trunk.weight._version > before


def test_a_seed_that_is_changed_counts_from_the_next_event_as_without_kernels(forced):
    found = []
    for by_kernels in (False, True):
        if by_kernels:
            forced()
        torch.manual_seed(0)
        model, optimizer, rule = trained_rule()
        step(model, optimizer, rule)
        rule.seed = 7
        step(model, optimizer, rule)
        found.append(model.trunk.topology.block_rows.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("kind", [sk.SET, sk.RigL, partial(sk.GMP, end_step=9)])
def test_a_copy_of_a_rule_that_has_rewired_goes_on_as_the_rule_does(forced, kind, copied):
    forced()
    model, optimizer, rule = trained_rule(kind)
    for _ in range(2):
        step(model, optimizer, rule)
    found = []
    for of_copy in (copied((model, optimizer, rule)), (model, optimizer, rule)):
        torch.manual_seed(0)
        step(*of_copy)
        found.append(results(of_copy[0], [], *of_copy[1:]) | {"stats": of_copy[2].stats()})
    assert_equal(found[:1], found[1:])


def test_a_nan_that_was_dropped_is_named_by_stats_once_and_not_forgotten_with_the_tables(forced):
    forced()
    model, optimizer, rule = trained_rule()
    step(model, optimizer, rule)
    with torch.no_grad():
        model.trunk.weight[0, 0, 0] = torch.nan
        rule.step()
        model.trunk.weight.set_(model.trunk.weight.clone())
    rule.step()
    with pytest.warns(UserWarning, match="layer 'trunk' has NaN weights"):
        rule.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule.step()
        rule.stats()


def test_a_rewire_by_the_kernels_between_forward_and_backward_is_refused_as_any_other(forced):
    forced()
    model, optimizer, rule = trained_rule()
    step(model, optimizer, rule)
    y = model(torch.randn(5, model.in_features))
    assert rule.step()
    with pytest.raises(RuntimeError, match="modified|rewire"):
        y.sum().backward()
    assert rule.step() and model(torch.randn(5, model.in_features)).isfinite().all()


def test_scores_that_are_refused_leave_every_layer_as_it_was(forced):
    forced()
    model, optimizer, rule = trained_rule(Middle)
    assert step(model, optimizer, rule)
    before = copy.deepcopy((model.state_dict(), rule.state_dict()))
    rule.grow_scores = lambda layer: torch.zeros(1) if layer is model.heads else None
    with pytest.raises(ValueError, match="grow_scores: layer 'heads' wants floating-point scores"):
        step(model, optimizer, rule)
    assert rule.state_dict()["carry"] == before[1]["carry"]
    names = [name for name in before[0] if "block" in name]
    assert names and all(torch.equal(model.state_dict()[name], before[0][name]) for name in names)


def test_a_gradient_that_the_kernels_cannot_reset_is_refused_before_anything_changes(forced):
    forced()
    model, optimizer, rule = trained_rule()
    step(model, optimizer, rule)
    weight = model.trunk.weight
    weight.grad = torch.zeros(weight.numel() + 1)[1:].view_as(weight)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="layer 'trunk' has a gradient of torch.float32 with strides .*at 16 bytes"):
        rule.step()
    assert torch.equal(weight, before)


needs_gpu = pytest.mark.skipif(bool(cuda.unavailable()), reason=f"backend 'cuda': {cuda.unavailable()}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [name for name in CASES if "RigL" not in name])  # whose scores may differ by rounding
def test_events_on_a_gpu_are_those_by_torch_bit_for_bit(name):
    theirs = train(CASES[name], device="cuda", rewiring=lambda: sk.use("reference"))
    assert_equal(train(CASES[name], device="cuda", rewiring=lambda: sk.use("cuda")), theirs)
