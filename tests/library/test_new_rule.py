"""A rule of one's own is two functions: the base class counts, selects and moves what belongs to a block."""

import copy

import pytest
import torch
from oracle import random_topology
from torch import nn

import sparsekern as sk


class Middle(sk.DropAndGrow):
    """Drop the strongest blocks, grow as near to the middle of the matrix as there is room."""

    def drop_scores(self, layer):
        return -layer.weight.detach().float().abs().sum((1, 2))

    def grow_scores(self, layer):
        row, col = (torch.linspace(-1, 1, n // layer.groups) for n in layer.topology.grid)
        return (2 - row[:, None].abs() - col.abs()).expand(layer.groups, -1, -1)


@pytest.mark.parametrize(("block_size", "groups"), [(1, 1), (4, 1), (2, 3)])
def test_a_rule_of_two_functions_drops_and_grows_by_them(block_size, groups):
    topology = random_topology((6, 7), block_size, groups)
    layer = sk.SparseLinear(*topology.shape[::-1], topology=topology)
    optimizer = torch.optim.Adam(layer.parameters())
    target = copy.deepcopy(layer)
    layer(torch.randn(3, layer.in_features)).sum().backward()
    optimizer.step()
    before, norms = layer.topology.mask(), layer.weight.detach().abs().sum((1, 2))
    group = layer.topology.block_rows.long() // 6
    rule = Middle(layer, optimizer, drop_fraction=0.3, update_every=1, followers=[target])
    table = rule.grow_scores(layer)
    state = copy.deepcopy(rule.state_dict())
    assert rule.step()
    after = layer.topology.mask()
    for g in range(groups):
        slots = (group == g).nonzero().squeeze(1)
        count = int(0.3 * len(slots) + 1e-9)
        strongest = slots[norms[slots].argsort(descending=True)[:count]]
        assert not layer.weight[strongest].any() and not optimizer.state[layer.weight]["exp_avg"][strongest].any()
        grown = after[g] & ~before[g]
        assert grown.sum() == count
        dead = table[g][~before[g]].sort(descending=True).values
        assert sorted(table[g][grown].tolist(), reverse=True) == dead[:count].tolist()
    assert torch.equal(target.topology.mask(), after)
    rule.load_state_dict(state)


def rule_of(drop=None, grow=None, layers=1):
    functions = {"drop_scores": drop, "grow_scores": grow}
    kind = type("Mine", (sk.DropAndGrow,), {name: f for name, f in functions.items() if f})
    model = nn.Sequential(*(sk.SparseLinear(32, 24, density=0.4, block_size=4) for _ in range(layers)))
    return model, kind(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1, drop_fraction=0.5)


def test_places_with_a_negative_or_infinite_score_do_not_grow():
    forbidden = torch.zeros(1, 6, 8)
    forbidden[0, :3], forbidden[0, 3], forbidden[0, 4] = -1.0, float("inf"), float("nan")
    model, rule = rule_of(grow=lambda self, layer: forbidden)
    before = model[0].topology.mask()
    rule.step()
    grown = model[0].topology.mask() & ~before
    assert torch.equal(grown[0, 5], ~before[0, 5]) and not grown[0, :5].any()


def test_a_score_of_minus_zero_may_grow():
    model, rule = rule_of(grow=lambda self, layer: -torch.zeros(1, 6, 8))
    assert rule.step() and rule.stats()["0"]["grown"] == rule.stats()["0"]["dropped"] > 0


def test_a_rule_that_does_not_say_where_to_grow_is_told_so():
    with pytest.raises(NotImplementedError, match=r"Mine.*override grow_scores\(layer\)"):
        rule_of()[1].step()


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (
            {"drop": lambda self, layer: layer.weight},
            r"Mine.drop_scores: layer '0' wants .* \(19,\), got .*\(19, 4, 4\)",
        ),
        ({"drop": lambda self, layer: [1.0]}, "Mine.drop_scores.*got list"),
        ({"grow": lambda self, layer: torch.zeros(6, 8)}, r"Mine.grow_scores.*\(1, 6, 8\), got torch.float32 \(6, 8\)"),
        ({"grow": lambda self, layer: torch.zeros(1, 6, 8).bool()}, r"Mine.grow_scores.*got torch.bool"),
    ],
)
def test_scores_of_another_shape_or_type_are_refused_and_nothing_moves(functions, message):
    model, rule = rule_of(**({"grow": lambda self, layer: None} | functions))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rule.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_event_that_fails_at_the_second_layer_leaves_the_first_as_it_was():
    grids = iter([torch.zeros(1, 6, 8), torch.zeros(1, 6, 9)])
    model, rule = rule_of(grow=lambda self, layer: next(grids), layers=2)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(rule.state_dict()["carry"])
    with pytest.raises(ValueError, match=r"layer '1' wants.*\(1, 6, 8\), got.*\(1, 6, 9\)"):
        rule.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert rule.state_dict()["carry"] == state
