import copy
import gc
import math
import pickle
import warnings
import weakref
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_topology
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk

RULES = {"SET": sk.SET, "RigL": sk.RigL}


class Heads(nn.Module):
    """A trunk of blocks, unstructured ragged heads, and a dense layer between them."""

    def __init__(self):
        super().__init__()
        self.trunk = sk.SparseLinear(30, 40, density=0.3, block_size=4)
        self.dense = nn.Linear(40, 20)
        self.heads = sk.SparseLinear(3 * 20, 3 * 7, density=0.25, block_size=1, groups=3)

    def forward(self, x, group):
        return self.heads(self.dense(self.trunk(x).relu()), group=group)


def train(model, optimizer, rule, steps):
    changed = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 30), torch.randint(0, 3, (16,))).square().mean().backward()
        optimizer.step()
        changed.append(rule.step())
    return changed


def one_layer(live=0.4, block_size=4, groups=1, dead=0, seed=0, rule=sk.SET, **arguments):
    topology = random_topology((6, 7), block_size, groups, live, dead, seed=seed)
    layer = sk.SparseLinear(*topology.shape[::-1], topology=topology)
    optimizer = torch.optim.Adam(layer.parameters())
    return layer, optimizer, rule(layer, optimizer, **({"update_every": 1} | arguments))


def events(rule, layer, clocks):
    """Times at which the rule rewired; a backward pass goes before every step, for RigL."""
    times = []
    for clock in clocks:
        layer.zero_grad()
        layer(torch.randn(2, layer.in_features)).sum().backward()
        if rule.step() if clock is None else rule.step(clock=clock):
            times.append(clock if clock is not None else rule.clock)
    return times


@pytest.mark.parametrize("rule", RULES.values())
def test_topologies_stay_exact_and_consistent_over_many_rewires(rule):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    rule = rule(model, optimizer, drop_fraction=0.3, update_every=2)
    live = [layer.topology.live_per_group() for layer in (model.trunk, model.heads)]
    seen = set()
    for _ in range(30):
        train(model, optimizer, rule, 2)
        for layer, counts in zip((model.trunk, model.heads), live, strict=True):
            t = layer.topology
            assert t.live_per_group() == counts
            fresh = sk.Topology(t.block_rows, t.block_cols, t.shape, t.block_size, t.groups)  # refuses duplicates
            assert torch.equal(fresh.index, t.index)
            assert (layer.weight[~layer.lanes().expand_as(layer.weight)] == 0).all()
        seen.add(str(model.heads.topology.mask().tolist()))
    assert len(seen) == 30


@pytest.mark.parametrize("rule", RULES.values())
def test_nothing_moves_in_memory_over_a_hundred_rewires(rule):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters())
    rule = rule(model, optimizer, update_every=1)
    train(model, optimizer, rule, 1)

    def addresses():
        tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
        tensors += [*model.trunk.topology.layout[:3], *model.heads.topology.layout[:3]]
        tensors += [t for state in optimizer.state.values() for t in state.values()]
        return [(id(t), t.data_ptr()) for t in tensors]

    optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)
    before = addresses()
    assert all(train(model, optimizer, rule, 100))
    assert addresses() == before


@given(
    st.sampled_from([(1, 1), (4, 1), (2, 3)]),
    st.floats(0, 1),
    st.sampled_from([0.1, 0.5, 0.8, 1.0]),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_an_event_drops_the_weakest_and_grows_as_many_blocks_that_were_dead(kind, fraction, live, dead, seed):
    block_size, groups = kind
    layer, _, rule = one_layer(live, block_size, groups, dead, seed, drop_fraction=fraction)
    topology, rng = layer.topology, np.random.default_rng(seed)
    with torch.no_grad():  # few distinct norms, so that ties decide
        layer.weight.copy_(torch.from_numpy(rng.integers(0, 3, (topology.num_slots, 1, 1))).expand_as(layer.weight))
        layer.weight.mul_(layer.lanes())
    norms = layer.weight.detach().abs().sum((1, 2)).numpy()
    before, weight = topology.mask().numpy(), layer.weight.detach().clone()
    rows, cols = topology.block_rows.numpy().copy(), topology.block_cols.numpy().copy()
    changed = rule.step()
    group = np.where(rows < 0, groups, rows // 6)
    dropped = []
    for g in range(groups):
        slots = np.flatnonzero(group == g)
        count = min(math.floor(fraction * len(slots) + 1e-9), 42 - len(slots))
        dropped += slots[np.lexsort((slots, norms[slots]))][:count].tolist()
    rewired = (rows != topology.block_rows.numpy()) | (cols != topology.block_cols.numpy())
    assert np.flatnonzero(rewired).tolist() == sorted(dropped)
    assert changed == bool(dropped)
    after = topology.mask().numpy()
    assert after.sum((1, 2)).tolist() == before.sum((1, 2)).tolist()
    assert (after & ~before).sum() == len(dropped), "a dropped block is no candidate"
    assert not layer.weight[torch.from_numpy(rewired)].any()
    assert torch.equal(layer.weight[torch.from_numpy(~rewired)], weight[torch.from_numpy(~rewired)])
    stats = rule.stats()[""]
    assert (stats["dropped"], stats["grown"]) == (len(dropped), len(dropped))


@pytest.mark.parametrize("rule", RULES.values())
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9, 1.0])
def test_a_drop_fraction_of_one_replaces_all_it_can(rule, density):
    layer, _, rule = one_layer(density, 2, rule=rule, drop_fraction=1.0)
    before = layer.topology.mask()
    layer(torch.randn(3, layer.in_features)).sum().backward()
    changed = rule.step()
    places = before.numel() - before.sum().item()
    kept = (before & layer.topology.mask()).sum()
    assert kept == max(before.sum().item() - places, 0)
    assert layer.topology.num_live == before.sum() and changed == (places > 0)


def test_a_drop_fraction_may_be_assigned_as_it_is_given():
    model = nn.Sequential(sk.SparseLinear(32, 32, density=0.5, block_size=4))
    rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), drop_fraction=0.5, update_every=1)
    rule.step()
    assert rule.stats()["0"]["dropped"] == 16
    rule.drop_fraction = 0.25
    rule.step()
    assert rule.stats()["0"]["dropped"] == 8
    with pytest.raises(ValueError, match=r"drop_fraction must be in \[0, 1\], got 2"):
        rule.drop_fraction = 2
    with pytest.raises(ValueError, match="SET: Cosine.*needs an end_step, got None"):
        rule.drop_fraction = sk.cosine(0.3)
    assert rule.drop_fraction(0.5) == 0.25


def test_a_drop_fraction_of_zero_changes_nothing():
    layer, _, rule = one_layer(drop_fraction=0.0)
    before = copy.deepcopy(layer.state_dict())
    assert not any(rule.step() for _ in range(5))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_the_remainder_is_carried_so_that_few_blocks_are_rewired_too():
    layer = sk.SparseLinear(64, 64, density=10 / 256, block_size=4)
    rule = sk.SET(layer, torch.optim.SGD(layer.parameters(), 0.1), drop_fraction=0.29, update_every=1)
    dropped = [rule.stats()[""]["dropped"] for _ in range(100) if rule.step() or True]
    assert sum(dropped) == 290 and set(dropped) == {2, 3}


def test_rigl_grows_where_the_gradient_of_the_masked_dense_layer_is_largest():
    layer, _, rule = one_layer(0.4, 4, rule=sk.RigL, drop_fraction=0.5, update_every=2)
    rule.step()
    norms = np.zeros((6, 7))
    for _ in range(2):  # micro-batches: squared norms add up
        x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
        layer(x).backward(dy)
        gradient = dy.double().numpy().T @ x.double().numpy()
        norms += (gradient.reshape(6, 4, 7, 4) ** 2).sum((1, 3))
    before = layer.topology.mask()[0].numpy()
    rule.step()
    grown = layer.topology.mask()[0].numpy() & ~before
    threshold = np.sort(norms[~before])[::-1][grown.sum() - 1]
    assert grown.sum() == before.sum() // 2
    assert (grown == (~before & (norms >= threshold))).all()


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**16])
def test_scaled_gradients_grow_the_same_blocks(scale):
    masks = []
    for factor in (1.0, scale):
        torch.manual_seed(1)
        layer, _, rule = one_layer(0.4, 4, rule=sk.RigL)
        (layer(torch.randn(5, layer.in_features)).square().sum() * factor).backward()
        rule.step()
        masks.append(layer.topology.mask())
    assert torch.equal(*masks)


def test_a_step_skipped_for_infinite_gradients_moves_no_block_by_them():
    layer, optimizer, rule = one_layer(0.4, 4, rule=sk.RigL, drop_fraction=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(layer.state_dict())
    scaler.scale(layer(torch.full((3, layer.in_features), 3e38)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    rule.step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert rule.stats()[""]["dropped"] == rule.stats()[""]["grown"] == 0


CLOCKS = [
    ({"update_every": 3}, [None] * 10, [3, 6, 9]),
    ({"update_every": 3, "start_step": 4, "end_step": 11}, [None] * 20, [7, 10]),
    ({"update_every": 3, "end_step": 9}, [None] * 20, [3, 6, 9]),
    ({"update_every": 5, "start_step": 4, "end_step": 4}, [None] * 20, []),
    ({"update_every": 100}, [99, 100, 150, 205, 299, 300], [100, 205, 300]),
    ({"update_every": 100}, [30, 60, 90, 120, 150, 180, 210], [120, 210]),
    ({"update_every": 100}, [350, 360, 399, 400, 1000, 1001], [350, 400, 1000]),
    ({"update_every": 0.1, "end_step": 0.5}, [i / 10 for i in range(1, 10)], [0.1, 0.2, 0.3, 0.4, 0.5]),
    ({"update_every": 100, "start_step": 50, "end_step": 260}, [0, 149, 151, 255, 1000], [151, 255]),
]


@pytest.mark.parametrize(("arguments", "clocks", "expected"), CLOCKS)
def test_set_rewires_at_the_documented_times_only(arguments, clocks, expected):
    layer, _, rule = one_layer(0.4, 1, **arguments)
    assert events(rule, layer, clocks) == expected
    assert rule.events == len(expected)


@pytest.mark.parametrize(("arguments", "clocks", "expected"), CLOCKS[:4])
def test_rigl_counts_steps_as_set_does(arguments, clocks, expected):
    layer, _, rule = one_layer(0.4, 1, rule=sk.RigL, **arguments)
    assert events(rule, layer, clocks) == expected


def test_rigl_puts_an_event_that_its_clock_did_not_foresee_off_by_one_step():
    layer, _, rule = one_layer(0.4, 1, rule=sk.RigL, update_every=100)
    assert events(rule, layer, [10, 20, 130, 140, 150, 199, 230, 240, 260, 290, 310]) == [140, 230, 310]


def test_a_clock_that_runs_backwards_is_refused():
    layer, _, rule = one_layer()
    rule.step(clock=5)
    with pytest.raises(ValueError, match="got 4 after 5"):
        rule.step(clock=4)


def test_cosine_falls_from_the_fraction_to_zero_at_the_end_step():
    layer, _, rule = one_layer(0.5, 1, seed=3, drop_fraction=sk.cosine(0.6), end_step=10)
    live, dropped = layer.topology.num_live, []
    for _ in range(10):
        rule.step()
        dropped.append(rule.stats()[""]["dropped"])
    exact = np.cumsum([0.3 * (1 + math.cos(math.pi * t / 10)) * live for t in range(1, 11)])
    assert np.cumsum(dropped).tolist() == np.floor(exact + 1e-9).tolist()


def test_a_schedule_of_ones_own_gets_the_progress_and_may_not_leave_zero_to_one():
    asked = []
    layer, _, rule = one_layer(
        drop_fraction=lambda progress: asked.append(progress) or progress, start_step=2, end_step=6
    )
    live = layer.topology.num_live
    assert events(rule, layer, [None] * 8) == [3, 4, 5, 6] and asked == [0.25, 0.5, 0.75, 1.0]
    assert layer.topology.num_live == live
    layer, _, rule = one_layer(drop_fraction=lambda progress: -0.2)
    with pytest.raises(ValueError, match=r"drop_fraction must be in \[0, 1\], got -0.2"):
        rule.step()


@pytest.mark.parametrize(("updates", "share"), [(40, 0.54), (80, 0.76)])
def test_coverage_is_that_of_random_drops_in_theory(updates, share):
    layer = sk.SparseLinear(64, 64, density=0.1, block_size=1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rule = sk.SET(layer, optimizer, sk.cosine(0.3), update_every=1, end_step=updates, coverage=True)
    for _ in range(updates):
        with torch.no_grad():
            layer.weight.normal_()
        rule.step()
    assert rule.stats()[""]["coverage"] == pytest.approx(share, abs=0.015)


def test_stats_count_rows_and_columns_without_live_blocks():
    topology = sk.Topology(torch.tensor([0, 0, 3, -1]), torch.tensor([1, 2, 4, -1]), (16, 24), 4, groups=2)
    layer = sk.SparseLinear(24, 16, topology=topology)
    stats = sk.Static(layer).stats()[""]
    assert stats == {"live": 3, "dropped": 0, "grown": 0, "dead_rows": 2, "dead_cols": 3}


def test_static_never_rewires():
    layer, optimizer, _ = one_layer()
    rule, before = sk.Static(layer), copy.deepcopy(layer.state_dict())
    assert events(rule, layer, [None] * 20) == []
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_rules_of_one_seed_agree_and_layers_and_seeds_differ():
    def grown(seed):
        torch.manual_seed(0)
        topology = random_topology((8, 8), 2)
        model = nn.Sequential(*(sk.SparseLinear(16, 16, topology=topology) for _ in range(2)))
        with torch.no_grad():
            model[1].weight.copy_(model[0].weight)
        torch.manual_seed(seed + 100)  # the global generator must not matter
        rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1, seed=seed)
        rule.step()
        return [layer.topology.mask().tolist() for layer in model]

    first, again, other = grown(1), grown(1), grown(2)
    assert first == again and first != other and first[0] != first[1]


@pytest.mark.parametrize("rule", RULES.values())
def test_a_rule_that_is_given_up_leaves_nothing_behind(rule):
    model = sk.SparseConv2d(2, 4, 3, density=0.5, block_size=2)
    optimizer, target = torch.optim.SGD(model.parameters(), 0.1), copy.deepcopy(model)
    rule = rule(model, optimizer, update_every=1, followers=[target])
    rule.step()
    memory = weakref.ref(target)
    del rule, target
    gc.collect()
    assert memory() is None and not optimizer._optimizer_load_state_dict_post_hooks
    assert model.growth is None  # else every backward would be scored for ever


def test_a_rule_that_follows_another_keeps_its_own_scores():
    model = sk.SparseLinear(16, 16, density=0.3, block_size=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = sk.RigL(model, optimizer, update_every=1)
    rule = sk.RigL(model, optimizer, update_every=1)
    gc.collect()
    model(torch.randn(3, 16)).sum().backward()
    assert rule.step() and rule.stats()[""]["grown"] > 0


def test_a_copy_of_a_model_is_not_scored_for_the_rule_of_the_original():
    model = sk.SparseLinear(16, 16, density=0.3, block_size=2)
    rule = sk.RigL(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.growth is None
        torch.func.grad(lambda x, other=other: other(x).sum())(torch.randn(3, 16))
    assert model.growth is not None and rule.step()


@pytest.mark.parametrize("rule", RULES.values())
def test_a_frozen_layer_is_left_alone(rule):
    model = nn.Sequential(*(sk.SparseLinear(16, 16, density=0.3, block_size=2) for _ in range(2)))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    rule = rule(model, optimizer, update_every=1)
    before = [layer.topology.mask() for layer in model]
    model(torch.randn(3, 16)).sum().backward()
    assert rule.step() and list(rule.stats()) == ["1"]
    assert torch.equal(model[0].topology.mask(), before[0]) and not torch.equal(model[1].topology.mask(), before[1])


@pytest.mark.parametrize("rule", RULES.values())
def test_a_layer_that_is_frozen_later_is_left_alone_until_it_is_trained_again(rule):
    model = nn.Sequential(*(sk.SparseLinear(16, 16, density=0.3, block_size=2) for _ in range(2)))
    optimizer = torch.optim.Adam(model.parameters())
    rule = rule(model, optimizer, update_every=1, drop_fraction=0.3)

    def moved():
        before = [(layer.to_dense(), layer.topology.mask()) for layer in model]
        model(torch.randn(3, 16)).sum().backward()
        assert rule.step()
        after = [(layer.to_dense(), layer.topology.mask()) for layer in model]
        return [not all(map(torch.equal, *pair)) for pair in zip(before, after, strict=True)]

    assert moved() == [True, True]
    carry = rule.state_dict()["carry"]["0"]
    model[0].weight.requires_grad_(False)  # as gradual unfreezing and fine-tuning do
    assert moved() == [False, True]
    assert rule.stats()["0"]["dropped"] == 0 and rule.state_dict()["carry"]["0"] == carry
    model[0].weight.requires_grad_(True)
    assert moved() == [True, True]


def test_followers_take_the_topology_the_rewired_values_and_nothing_else():
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    target = copy.deepcopy(model).requires_grad_(False)
    rule = sk.RigL(model, optimizer, update_every=3, drop_fraction=0.4, followers=[target])
    for _ in range(5):
        train(model, optimizer, rule, 2)
        own = {name: p.clone() for name, p in target.named_parameters()}
        before = copy.deepcopy(target.state_dict())
        train(model, optimizer, rule, 1)
        for name in ("trunk", "heads"):
            online, follower = model.get_submodule(name), target.get_submodule(name)
            assert all(map(torch.equal, online.topology.layout[:3], follower.topology.layout[:3]))
            moved = sum(
                before[f"{name}.topology.{c}"] != getattr(follower.topology, c) for c in ("block_rows", "block_cols")
            )
            moved = moved.bool()
            assert moved.any() and not follower.weight[moved].any()
            assert torch.equal(follower.weight[~moved], own[f"{name}.weight"][~moved])
        assert torch.equal(target.dense.weight, own["dense.weight"])
    with torch.no_grad():  # Polyak averaging with tau 1
        for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs, 1)
    x, group = torch.randn(5, 30), torch.tensor([0, 0, 1, 2, 1])
    assert torch.equal(target(x, group), model(x, group))


def test_blocks_without_a_candidate_keep_their_value_in_followers_too():
    layer, optimizer, _ = one_layer(0.4, 4)
    target = copy.deepcopy(layer)
    with torch.no_grad():
        target.weight.mul_(2)
    own = target.weight.clone()
    rule = sk.RigL(layer, optimizer, update_every=1, drop_fraction=0.5, followers=[target])
    layer(torch.full((1, layer.in_features), float("inf"))).sum().backward()
    rule.step()
    assert torch.equal(target.weight, own)


def same_blocks(model, follower):
    own, others = (
        [layer.topology for layer in m.modules() if isinstance(layer, sk.SparseLinear)] for m in (model, follower)
    )
    return all(one.is_at(other.block_rows, other.block_cols) for one, other in zip(own, others, strict=True))


@pytest.mark.parametrize(
    "assign", [lambda rule, own: [own], lambda rule, own: (*rule.followers, own)], ids=["in place", "beside"]
)
@pytest.mark.parametrize("kind", ["SET", "RigL", "GMP"])
def test_followers_that_are_assigned_between_two_events_follow_from_the_next(kind, assign):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    first = copy.deepcopy(model)
    options = {"end_step": 9, "final_density": 0.1} if kind == "GMP" else {}
    rule = getattr(sk, kind)(model, optimizer, update_every=2, followers=[first], **options)
    train(model, optimizer, rule, 5)
    assert rule.events == 2 and rule.followers == (first,) and same_blocks(model, first)
    later = copy.deepcopy(model)
    rule.followers = assign(rule, later)
    train(model, optimizer, rule, 1)
    assert rule.events == 3 and rule.followers[-1] is later
    assert same_blocks(model, later) and same_blocks(model, first) == (first in rule.followers)


def test_followers_are_not_changed_unseen():
    model = Heads()
    rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), followers=[copy.deepcopy(model)])
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'append'"):
        rule.followers.append(copy.deepcopy(model))


@pytest.mark.parametrize("kind", ["SET", "GMP"])
def test_a_follower_that_was_moved_to_another_device_is_refused_before_anything_changes(kind):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    follower = copy.deepcopy(model)
    options = {"update_every": 1, "followers": [follower]} | ({"end_step": 9} if kind == "GMP" else {})
    rule = getattr(sk, kind)(model, optimizer, **options)
    train(model, optimizer, rule, 1)
    follower.to("meta")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=f"{kind}.step: layer 'trunk' is on cpu, but that of a follower is on meta"):
        rule.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, follower: follower, "SET: followers must be a list of modules, got Heads"),
        (lambda model, follower: [follower, None], "SET: followers must be a list of modules, got NoneType in it"),
        (lambda model, follower: [model], "SET: layer 'trunk' of a follower is that of the model or of another"),
        (lambda model, follower: 2 * [follower], "SET: layer 'trunk' of a follower is that of the model or of another"),
        (lambda model, follower: [Heads()], "SET: layer 'trunk' of a follower has another topology than the model"),
        (lambda model, follower: [model.trunk], "SET: a follower needs a sparse layer 'trunk' .* nothing there"),
    ],
    ids=["a module", "none", "the model", "twice", "another topology", "another model"],
)
def test_followers_that_are_assigned_are_checked_as_those_at_the_start(wrong, message):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    follower = copy.deepcopy(model)
    rule = sk.SET(model, optimizer, update_every=1, followers=[follower])
    train(model, optimizer, rule, 1)
    with pytest.raises(ValueError, match=message):
        rule.followers = wrong(model, follower)
    train(model, optimizer, rule, 1)
    assert rule.followers == (follower,) and rule.events == 2 and same_blocks(model, follower)


@pytest.mark.parametrize("kind", ["SET", "RigL"])
def test_an_optimizer_that_is_assigned_between_two_events_is_reset_from_the_next(kind):
    model = Heads()
    first, second = (torch.optim.Adam(model.parameters(), rate) for rate in (0.01, 0.001))
    rule = getattr(sk, kind)(model, first, update_every=2)
    train(model, first, rule, 5)
    rule.optimizer = second
    assert rule.optimizer is second
    before, old = model.trunk.topology.layout.positions(), first.state[model.trunk.weight]["exp_avg"].clone()
    train(model, second, rule, 1)
    moved = before != model.trunk.topology.layout.positions()
    averages = second.state[model.trunk.weight]["exp_avg"]
    assert rule.events == 3 and moved.any()
    assert not averages[moved].any() and averages[~moved].any()
    assert torch.equal(first.state[model.trunk.weight]["exp_avg"], old)


def test_a_checkpoint_of_other_blocks_wants_the_state_of_the_optimizer_that_was_assigned():
    model = Heads()
    first, second = (torch.optim.Adam(model.parameters()) for _ in range(2))
    rule = sk.SET(model, first, update_every=2)
    rule.optimizer = second
    train(model, second, rule, 1)
    model.load_state_dict(Heads().state_dict())
    first.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="still holds the state of the old blocks"):
        rule.step()
    second.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    assert rule.step()


def test_an_optimizer_that_is_assigned_brings_state_of_the_blocks_that_are_there_then():
    model = Heads()
    first, second = (torch.optim.Adam(model.parameters()) for _ in range(2))
    rule = sk.SET(model, first, update_every=1)
    train(model, first, rule, 1)
    model.load_state_dict(Heads().state_dict())
    second.load_state_dict(first.state_dict())  # a checkpoint, which the rule could not see
    rule.optimizer = second
    assert rule.step()
    model.load_state_dict(Heads().state_dict())
    with pytest.raises(RuntimeError, match="still holds the state of the old blocks"):
        rule.step()


def test_a_state_that_was_loaded_is_no_excuse_for_blocks_that_are_loaded_many_steps_later():
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters())
    rule = sk.SET(model, optimizer, update_every=10)
    train(model, optimizer, rule, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, rule, 2)
    model.load_state_dict(Heads().state_dict())
    with pytest.raises(RuntimeError, match="still holds the state of the old blocks"):
        rule.step()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
def test_the_copy_of_a_rule_notices_that_its_optimizer_loads_a_state(copied):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters())
    rule = sk.SET(model, optimizer, update_every=1)
    train(model, optimizer, rule, 1)
    model, optimizer, rule = copied((model, optimizer, rule))
    model.load_state_dict(Heads().state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert rule.optimizer is optimizer and rule.step()


def test_an_optimizer_that_was_replaced_holds_nothing_of_the_rule():
    model = Heads()
    first, second = (torch.optim.Adam(model.parameters()) for _ in range(2))
    rule = sk.SET(model, first)
    for optimizer in (second, first, second):
        rule.optimizer = optimizer
    assert not first._optimizer_load_state_dict_post_hooks and len(second._optimizer_load_state_dict_post_hooks) == 1


def test_an_optimizer_that_is_assigned_is_checked_as_that_at_the_start():
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    rule = sk.SET(model, optimizer, update_every=1)
    with pytest.raises(ValueError, match="SET: the optimiser does not hold the weight of layer 'heads'"):
        rule.optimizer = torch.optim.Adam(model.trunk.parameters())
    with pytest.raises(ValueError, match="SET: optimizer must be a torch optimiser"):
        rule.optimizer = None
    train(model, optimizer, rule, 1)
    assert rule.optimizer is optimizer and rule.events == 1


@pytest.mark.parametrize("rule", RULES.values())
def test_nan_weights_are_dropped_first_with_a_warning_that_names_the_layer(rule):
    model = nn.Sequential(nn.ReLU(), sk.SparseLinear(16, 16, density=0.5, block_size=4))
    layer = model[1]
    rule = rule(model, torch.optim.SGD(layer.parameters(), 0.1), drop_fraction=0.3, update_every=1)
    layer(torch.randn(2, 16)).sum().backward()
    with torch.no_grad():
        layer.weight[5, 2, 1] = float("nan")
        layer.weight[6] = 0
    with pytest.warns(UserWarning, match=f"{type(rule).__name__}: layer '1' has NaN weights"):
        rule.step()
    assert layer.weight.isfinite().all() and not layer.weight[5].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 16)).sum().backward()
        rule.step()
        rule.stats()


def tied():
    model = nn.Sequential(*(sk.SparseLinear(16, 16, density=0.5) for _ in range(2)))
    model[1].weight = model[0].weight
    return model


def follower_of(model, change):
    follower = copy.deepcopy(model)
    change(follower)
    return [follower]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: sk.SET(nn.Linear(4, 4), o), "SET: the model has no sparse layers.*sparsify"),
        (lambda m, o: sk.RigL(m, torch.optim.SGD(nn.Linear(4, 4).parameters())), "'trunk'.*optimiser after sparsify"),
        (lambda m, o: sk.SET(tied(), o), "does not hold"),
        (lambda m, o: sk.SET(t := tied(), torch.optim.SGD(t.parameters())), "'0' and '1' share one weight"),
        (lambda m, o: sk.SET(m, o, start_step=5, end_step=4), "end_step.*4 and 5"),
        (lambda m, o: sk.SET(m, o, update_every=0), "update_every must be positive, got 0"),
        (lambda m, o: sk.SET(m, o, drop_fraction=1.2), r"\[0, 1\], got 1.2"),
        (lambda m, o: sk.SET(m, o, drop_fraction=-0.1), r"\[0, 1\], got -0.1"),
        (lambda m, o: sk.SET(m, o, drop_fraction=sk.cosine(0.3)), "needs an end_step"),
        (lambda m, o: sk.cosine(3), r"\[0, 1\], got 3"),
        (lambda m, o: sk.SET(m, o, followers=[nn.Linear(2, 2)]), "follower.*'trunk'.*nothing"),
        (
            lambda m, o: sk.SET(m, o, followers=follower_of(m, lambda f: setattr(f, "heads", nn.Linear(1, 1)))),
            "'heads'.*Linear",
        ),
        (
            lambda m, o: sk.SET(m, o, followers=follower_of(m, lambda f: oracle.rewire_at_random(f.trunk.topology, 0))),
            "'trunk' of a follower has another topology",
        ),
    ],
)
def test_impossible_rules_are_refused(make, message):
    model = Heads()
    with pytest.raises(ValueError, match=message):
        make(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("rule", RULES.values())
def test_weights_of_another_topology_need_the_state_of_their_optimiser(rule):
    torch.manual_seed(1)
    model, saved = Heads(), Heads()
    optimizer, other = (torch.optim.Adam(m.parameters()) for m in (model, saved))
    rule = rule(model, optimizer, update_every=2)
    train(saved, other, sk.Static(saved), 1)
    model.load_state_dict(saved.state_dict())  # before the first step there is no state to go stale
    train(model, optimizer, rule, 3)
    model.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="trunk, heads.*optimiser's checkpoint"):
        rule.step()
    optimizer.load_state_dict(other.state_dict())
    train(model, optimizer, rule, 4)
    assert model.heads.topology.live_per_group() == saved.heads.topology.live_per_group()


def test_rigl_waits_for_gradients_of_the_blocks_that_a_checkpoint_brought():
    layer, _, rule = one_layer(0.4, 4, rule=sk.RigL, update_every=2, seed=1)
    other, *_ = one_layer(0.6, 4, seed=2)
    assert events(rule, layer, [None]) == []
    layer(torch.randn(2, layer.in_features)).sum().backward()
    layer.load_state_dict(other.state_dict())
    assert not rule.step()
    assert events(rule, layer, [None]) == [3]
    assert rule.stats()[""]["grown"] == int(0.3 * other.topology.num_live)


@pytest.mark.parametrize("make", [sk.SET, partial(sk.GMP, end_step=1, final_density=0.1)], ids=["SET", "GMP"])
def test_a_rewire_between_forward_and_backward_is_noticed(make):
    layer, _, rule = one_layer(0.4, 4, rule=make)
    y = layer(torch.randn(3, layer.in_features, requires_grad=True))
    assert rule.step()
    with pytest.raises(RuntimeError, match="rewired, pruned or loaded after the forward"):
        y.sum().backward()


class NoReading(TorchDispatchMode):
    """Fail where a tensor's contents decide something on the host, which on a GPU would wait for the device."""

    FORBIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "is_nonzero", "equal"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} reads a tensor"
        if name in ("index", "index_put", "index_put_"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), "a boolean index is counted"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [sk.SET, sk.RigL, partial(sk.GMP, end_step=5)], ids=["SET", "RigL", "GMP"])
def test_a_rewire_decides_nothing_on_the_host(monkeypatch, make):
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters())
    rule = make(model, optimizer, update_every=1)
    # these two read a tensor where that costs nothing: the one on a CPU only, the other once the copy has arrived
    monkeypatch.setattr(rule, "_note_nan", lambda *_: None)
    monkeypatch.setattr(rule, "_settle", lambda **_: None, raising=False)
    train(model, optimizer, rule, 1)
    model(torch.randn(16, 30), torch.randint(0, 3, (16,))).square().mean().backward()
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    with NoReading():
        assert rule.step()
