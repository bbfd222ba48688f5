"""Rows of equal numbers of blocks: drawn by Topology.random, kept by SET and RigL."""

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import Topology


def row_counts(topology):
    return torch.bincount(topology.block_rows[topology.block_rows >= 0].long(), minlength=topology.grid[0])


@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (96, 96)])
@pytest.mark.parametrize("live", [1, 7, 20, 23, 0.6, 0.9])
def test_balanced_rows_differ_by_at_most_one_block_and_cover_the_columns(shape, live):
    topology = Topology.random(shape, live, 8, groups=2, balance="rows")
    counts = row_counts(topology).view(2, -1)
    assert (counts.amax(1) - counts.amin(1) <= 1).all()
    unbalanced = Topology.random(shape, live, 8, groups=2)
    assert topology.live_per_group() == unbalanced.live_per_group()
    for drawn in (topology, unbalanced):
        if min(drawn.live_per_group()) >= max(drawn.grid) // 2:
            assert len(drawn.block_cols.unique()) == drawn.grid[1]


def test_every_place_of_a_balanced_row_is_as_likely_as_another():
    torch.manual_seed(0)
    total = sum(Topology.random((8, 8), 16, 1, balance="rows").mask().float() for _ in range(2000))
    assert total.mean() == 500 and (total - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def rule_on(layer, kind, **options):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    return kind(layer, optimizer, drop_fraction=0.4, update_every=1, balance="rows", **options)


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_event_keeps_the_number_of_every_row(kind, groups):
    torch.manual_seed(0)
    layer = sk.SparseLinear(64, 96, density=0.3, block_size=4, groups=groups)
    topology = layer.topology
    before, place = row_counts(topology), topology.layout.positions().tolist()
    rule = rule_on(layer, kind)
    for _ in range(4):
        layer(torch.randn(5, 64)).square().sum().backward()
        rule.step()
        now = topology.layout.positions().tolist()
        assert row_counts(topology).equal(before) and len(set(now)) == len(now) and set(now) != set(place)
        place = now


def test_growth_takes_the_best_dead_places_of_the_row_of_each_dropped_block():
    torch.manual_seed(0)
    scores = torch.rand(2, 6, 5)
    scores[0, 1] = -1  # this row may not grow

    class Best(sk.SET):
        def grow_scores(self, layer):
            return scores

    layer = sk.SparseLinear(20, 24, density=0.5, block_size=2, groups=2)
    mask, norms = layer.topology.mask().view(2, 6, 5), torch.zeros(2, 6, 5)
    norms.view(-1)[layer.topology.layout.positions()] = layer.weight.detach().abs().sum((1, 2))
    expected = mask.clone()
    for g in range(2):
        live = int(mask[g].sum())
        ranked = sorted(mask[g].nonzero().tolist(), key=lambda at: norms[g][tuple(at)])
        dropped = ranked[: int(0.4 * live)]
        for row in {r for r, _ in dropped}:
            dead = sorted((c for c in range(5) if not mask[g, row, c]), key=lambda c: -scores[g, row, c])
            going = [c for r, c in dropped if r == row]
            coming = [c for c in dead if scores[g, row, c] >= 0][: len(going)]
            expected[g, row, going[: len(coming)]] = False
            expected[g, row, coming] = True
    rule = rule_on(layer, Best)
    rule.step()
    assert layer.topology.mask().view(2, 6, 5).equal(expected) and not expected.equal(mask)
    assert expected[0, 1].equal(mask[0, 1])


def test_keys_of_few_places_are_refused():
    layer = sk.SparseLinear(16, 16, density=0.3, block_size=1)
    rule = rule_on(layer, sk.RigL)
    layer(torch.randn(3, 16)).sum().backward()
    with pytest.raises(ValueError, match="balance='rows' needs scores of all places.*block size 1"):
        rule.step()


def test_another_balance_is_refused():
    with pytest.raises(ValueError, match="Topology.random: balance must be 'rows' or None, got 'cols'"):
        Topology.random((16, 16), 0.5, 4, balance="cols")
    layer = sk.SparseLinear(16, 16, density=0.3, block_size=4)
    with pytest.raises(ValueError, match="SET: balance must be 'rows' or None, got True"):
        sk.SET(layer, torch.optim.SGD(layer.parameters(), 0.1), balance=True)
