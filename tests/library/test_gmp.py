import copy
from functools import partial

import numpy as np
import pytest
import torch
from oracle import live_blocks
from torch import nn

import sparsekern as sk


def model_of(density=1.0, **arguments):
    """Two layers of unequal size and block size, one of them in groups, one padded."""
    torch.manual_seed(0)
    first = sk.SparseLinear(32, 48, density=density, block_size=4, **arguments)
    return nn.Sequential(first, nn.ReLU(), sk.SparseLinear(48, 2 * 11, density=density, block_size=2, groups=2))


def rule_of(model, rule=sk.GMP, optimizer=torch.optim.Adam, **arguments):
    optimizer = optimizer(model.parameters(), 0.01)
    arguments = {"final_density": 0.1, "end_step": 20, "update_every": 4} | arguments
    return optimizer, rule(model, optimizer, **arguments)


def learn(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 32)).square().mean().backward()
    optimizer.step()


def train(model, optimizer, rule, steps=1):
    for _ in range(steps):
        learn(model, optimizer)
        changed = rule.step()
    return changed


def density_at(step, initial, final=0.1, end=20):
    return final + (initial - final) * (1 - step / end) ** 3


def live(layer):
    """(row, col) of the live blocks with the sum of their |w|."""
    sums = layer.weight.abs().sum((1, 2)).tolist()
    return {(r, c): sums[s] for r, c, s in live_blocks(layer.topology)}


@pytest.mark.parametrize("initial", [1.0, 0.6])
def test_layer_scope_keeps_the_largest_blocks_of_each_group_on_schedule(initial):
    model = model_of(initial)
    optimizer, rule = rule_of(model, scope="layer", compact=False)
    layers, first = (model[0], model[2]), [layer.topology.live_per_group() for layer in (model[0], model[2])]
    for step in range(1, 30):
        learn(model, optimizer)
        before = [live(layer) for layer in layers]
        changed = rule.step()
        assert changed == (step % 4 == 0 and step <= 20)
        for layer, old, start in zip(layers, before, first, strict=True):
            places = layer.topology.num_blocks // layer.groups
            if changed:
                now = [max(1, round(density_at(step, n / places) * places)) for n in start]
                assert layer.topology.live_per_group() == now
                for g, count in enumerate(now):
                    rows = layer.topology.grid[0] // layer.groups
                    own = {block: norm for block, norm in old.items() if block[0] // rows == g}
                    kept = {block for block in live(layer) if block[0] // rows == g}
                    assert kept == set(sorted(own, key=own.get)[len(own) - count :])
            else:
                assert live(layer) == old
    assert [layer.topology.live_per_group() for layer in layers] == [[10], [7, 7]]


def test_global_scope_keeps_the_largest_blocks_of_all_layers_on_schedule():
    model = nn.Sequential(*(sk.SparseLinear(*s, density=1.0, block_size=4) for s in ((32, 48), (48, 28))))
    optimizer, rule = rule_of(model, compact=False)
    places = sum(layer.topology.num_blocks for layer in model)
    for step in range(4, 21, 4):
        train(model, optimizer, rule, 3)
        learn(model, optimizer)
        before = [live(layer) for layer in model]
        assert rule.step()
        count = round(density_at(step, 1.0) * places)
        assert sum(layer.topology.num_live for layer in model) == count
        ranked = sorted((norm for layer in before for norm in layer.values()), reverse=True)
        for layer, old in zip(model, before, strict=True):
            assert live(layer).keys() == {block for block, norm in old.items() if norm >= ranked[count - 1]}
    assert count == round(0.1 * places)


def test_global_scope_compares_the_mean_over_real_elements():
    model = nn.Sequential(
        sk.SparseLinear(8, 8, density=1.0, block_size=4), sk.SparseLinear(8, 5, density=1.0, block_size=4)
    )
    with torch.no_grad():
        model[0].weight.fill_(2)
        model[1].weight.fill_(1).mul_(model[1].lanes())
        model[1].weight[2:].mul_(3)  # the blocks of the lower row have one real row of four: sum 12, mean 3
    rule = sk.GMP(model, torch.optim.SGD(model.parameters(), 0.1), 0.75, end_step=1, update_every=1)
    rule.step()
    assert model[0].topology.mask().all() and model[1].topology.mask()[0].tolist() == [[False, False], [True, True]]


def test_global_scope_counts_elements_where_block_sizes_differ():
    model = model_of()
    optimizer, rule = rule_of(model, final_density=0.3)
    train(model, optimizer, rule, 20)
    elements = sum(layer.topology.num_live * layer.block_size**2 for layer in (model[0], model[2]))
    total = sum(layer.topology.num_blocks * layer.block_size**2 for layer in (model[0], model[2]))
    assert 0 <= elements - 0.3 * total < 16


@pytest.mark.parametrize("arguments", [{"start_step": 5, "end_step": 19}, {"update_every": 1}, {"end_step": 3}])
def test_the_last_event_is_at_the_end_step_and_meets_the_final_density(arguments):
    model = model_of()
    optimizer, rule = rule_of(model, scope="layer", **arguments)
    start, end = arguments.get("start_step", 0), arguments.get("end_step", 20)
    times = [t for t in range(1, 40) if train(model, optimizer, rule)]
    assert times[-1] == end and all(start < t <= end for t in times)
    assert model[2].topology.live_per_group() == [7, 7]


def test_an_own_clock_past_the_end_brings_the_last_event_once():
    model = model_of()
    optimizer, rule = rule_of(model, scope="layer", update_every=1000, end_step=10_000)
    for clock, fires in ((500, False), (1200, True), (1900, False), (50_000, True), (60_000, False)):
        assert rule.step(clock=clock) == fires
    assert model[0].topology.live_per_group() == [10]


def storage(tensor):
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_compaction_frees_memory_and_changes_nothing_else(scope):
    torch.manual_seed(3)
    model, plain = model_of(), model_of()
    target = copy.deepcopy(model)
    optimizer, rule = rule_of(
        model, optimizer=partial(torch.optim.AdamW, amsgrad=True), scope=scope, followers=[target]
    )
    other, without = rule_of(plain, optimizer=partial(torch.optim.AdamW, amsgrad=True), scope=scope, compact=False)
    ids = [id(p) for p in (*model.parameters(), *target.parameters())]
    for _ in range(30):
        rng = torch.get_rng_state()
        train(model, optimizer, rule)
        torch.set_rng_state(rng)
        train(plain, other, without)
        for ours, theirs in zip((model[0], model[2]), (plain[0], plain[2]), strict=True):
            torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=0, atol=1e-6)
        for follower in (target[0], target[2]):  # a full store multiplies its dead slots too
            assert not follower.weight[follower.topology.block_rows < 0].any()
        with torch.no_grad():
            for follower, online in zip(target.parameters(), model.parameters(), strict=True):
                follower.lerp_(online, 0.1)
    assert [id(p) for p in (*model.parameters(), *target.parameters())] == ids
    assert rule.compactions >= 4 and without.compactions == 0
    for layer, follower, still in ((model[0], target[0], plain[0]), (model[2], target[2], plain[2])):
        t = layer.topology
        assert t.num_slots == t.num_live == still.topology.num_live < still.topology.num_slots
        assert torch.equal(follower.topology.mask(), t.mask()) and follower.weight.shape == layer.weight.shape
        nbytes = t.num_live * t.block_size**2 * 4
        tensors = [layer.weight, layer.weight.grad, follower.weight]
        tensors += [s for s in optimizer.state[layer.weight].values() if s.numel() > 1]
        assert len(tensors) == 6 and [storage(tensor) for tensor in tensors] == [nbytes] * 6
        assert t.nbytes == 4 * t.num_slots + 4 * (4 * t.num_slots + 2 * sum(t.grid) + 2)
        assert storage(t.index) + storage(t.block_rows) + storage(t.block_cols) == t.nbytes
        assert not still.weight[still.topology.block_rows < 0].any()
        fresh = sk.Topology(t.block_rows, t.block_cols, t.shape, t.block_size, t.groups)
        assert torch.equal(fresh.index, t.index)
    assert any(p is model[0].weight for p in optimizer.param_groups[0]["params"])


def test_a_layer_is_compacted_once_half_of_its_slots_are_dead():
    model = nn.Sequential(sk.SparseLinear(32, 32, density=1.0, block_size=4))
    optimizer, rule = rule_of(model, final_density=0.1, end_step=100, update_every=1)
    for _ in range(100):
        train(model, optimizer, rule)
        topology = model[0].topology
        assert topology.num_live == topology.num_slots or 2 * topology.num_live > topology.num_slots
    assert topology.num_slots == topology.num_live == round(0.1 * 64) and rule.compactions == 4


def test_a_layer_may_be_pruned_away_altogether():
    model = nn.Sequential(*(sk.SparseLinear(16, 16, density=1.0, block_size=4, bias=False) for _ in range(2)))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    rule = sk.GMP(model, torch.optim.SGD(model.parameters(), 0.1), final_density=0.4, end_step=1, update_every=1)
    assert rule.step() and model[1].topology.num_live == 0
    x = torch.randn(3, 16, requires_grad=True)
    model(x).sum().backward()
    assert not x.grad.any() and not model[1].weight.grad.any()
    assert rule.stats()["1"] == {"live": 0, "dropped": 16, "grown": 0, "dead_rows": 4, "dead_cols": 4}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nan_blocks_are_pruned_first_with_a_warning(scope):
    model = model_of()
    optimizer, rule = rule_of(model, scope=scope, end_step=100)
    with torch.no_grad():
        model[0].weight[7, 1, 1] = float("nan")
        model[0].weight[3] = 0
    with pytest.warns(UserWarning, match="layer '0' has NaN weights"):
        rule.step(clock=4)
    assert model[0].weight.isfinite().all()
    assert (0, 7) not in live(model[0])


def test_stats_count_what_was_dropped():
    model = model_of()
    optimizer, rule = rule_of(model, scope="layer")
    train(model, optimizer, rule, 4)
    expected = 96 - round(density_at(4, 1.0) * 96)
    assert rule.stats()["0"]["dropped"] == expected and rule.stats()["0"]["grown"] == 0
    assert rule.stats()["0"]["live"] == 96 - expected


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_full_store_is_left_when_the_sparse_path_becomes_faster(monkeypatch, block_size):
    layer = sk.SparseLinear(32, 32, density=1.0, block_size=block_size)
    rule = sk.GMP(layer, torch.optim.SGD(layer.parameters(), 0.1), 0.6, end_step=2, update_every=1, compact=False)
    monkeypatch.setattr("sparsekern.choose.sparse_is_faster", lambda *_: rule.events == 2)
    x, stores = torch.randn(5, 32), []
    for _ in range(2):
        rule.step()
        stores.append(layer.topology.full)
        torch.testing.assert_close(layer(x), x @ layer.to_dense().t() + layer.bias, rtol=0, atol=1e-5)
    assert stores == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_density": 0.0}, r"\(0, 1\], got 0.0"),
        ({"final_density": 1.5}, r"\(0, 1\], got 1.5"),
        ({"scope": "local"}, "'global' or 'layer', got 'local'"),
        ({"end_step": None}, "end_step.*got None"),
        ({"start_step": 30}, "end_step.*got 20 and 30"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rule_of(model_of(), **arguments)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_density_that_is_below_the_final_one_already_is_kept(scope):
    model = nn.Sequential(sk.SparseLinear(32, 32, density=0.05, block_size=4))
    optimizer, rule = rule_of(model, scope=scope)
    before = model[0].topology.mask()
    train(model, optimizer, rule, 25)
    assert torch.equal(model[0].topology.mask(), before)
    assert np.isfinite(model[0].weight.detach().numpy()).all()
