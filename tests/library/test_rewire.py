"""The pure selections: what is dropped, what may grow, and that chance is fair."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import live_blocks, random_topology, topologies
from scipy.stats import chisquare

from sparsekern.rewire import growth
from sparsekern.rewire.hash import stream, uniform_hash
from sparsekern.rewire.scores import sortable
from sparsekern.rewire.select import places, random_candidates, weakest

SCORES = st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0, float("inf"), float("nan")])


def groups_of(topology):
    """Sets of live positions (row, col) of each group, in the group's own coordinates, with their slots."""
    rows, cols = (n // topology.groups for n in topology.grid)
    groups = [{} for _ in range(topology.groups)]
    for r, c, s in live_blocks(topology):
        groups[r // rows][r % rows, c % cols] = s
    return groups


@given(topologies(block_sizes=(1, 4)), st.data())
def test_the_weakest_are_the_smallest_by_score_then_slot_with_nan_first(topology, data):
    scores = np.array(data.draw(st.lists(SCORES, min_size=topology.num_slots, max_size=topology.num_slots)), np.float32)
    groups = [sorted(group.values()) for group in groups_of(topology)]
    counts = [data.draw(st.integers(0, len(slots))) for slots in groups]
    expected = []
    for slots, count in zip(groups, counts, strict=True):
        own = np.nan_to_num(scores[slots], nan=-1.0, posinf=np.inf)
        expected += np.array(slots, int)[np.lexsort((slots, own))][:count].tolist()
    live = [len(slots) for slots in groups]
    assert weakest(torch.from_numpy(scores), topology.layout, live, counts).tolist() == expected


@given(topologies(block_sizes=(1, 4)), st.integers(1, 10), st.integers(1, 40), st.data())
def test_the_best_candidates_are_the_best_dead_blocks_however_the_strips_fall(topology, count, strip, data):
    groups, rows, cols = topology.mask().shape
    size = groups * rows * cols
    scores = data.draw(st.lists(st.integers(-1, 4) | st.just(2**31 - 1), min_size=size, max_size=size))
    table = torch.tensor(scores).view(groups, rows, cols)
    whole, growth.STRIP = growth.STRIP, strip
    try:
        keys = growth.best_candidates(topology.layout, count, lambda strip, places: table[:, strip].flatten(1))
    finally:
        growth.STRIP = whole
    for g, live in enumerate(groups_of(topology)):
        dead = [(r, c) for r, c in np.ndindex(rows, cols) if (r, c) not in live and table[g, r, c] >= 0]
        best = sorted(dead, key=lambda p: (-table[g][p].item(), p))[:count]
        expected = [r * cols + c for r, c in best] + [-1] * (count - len(best))
        assert growth.positions_of(keys[g]).tolist() == expected
    block_rows, block_cols = places(keys, topology.layout, [count] * groups)
    assert torch.equal(block_rows < 0, growth.positions_of(keys).flatten() < 0)
    found = block_rows >= 0
    expected = growth.positions_of(keys).flatten()[found]
    assert torch.equal(block_rows[found] % rows * cols + block_cols[found] % cols, expected)
    assert torch.equal(block_rows[found] // rows, block_cols[found] // cols)


def test_random_growth_is_uniform_over_the_dead_blocks_and_their_pairs():
    topology = random_topology((3, 4), 1, groups=2, live=0.4, seed=5)
    single = [np.zeros(12, int), np.zeros(12, int)]
    pairs = [dict.fromkeys(itertools.combinations(range(12), 2), 0) for _ in range(2)]
    both = np.zeros((12, 12), int)
    for event in range(10_000):
        keys = random_candidates(topology.layout, 2, stream(7, 0, event))
        grown = growth.positions_of(keys).tolist()
        for g, chosen in enumerate(grown):
            single[g][chosen] += 1
            pairs[g][tuple(sorted(chosen))] += 1
        both[grown[0][0], grown[1][0]] += 1
    deads = [np.flatnonzero(~topology.mask()[g].flatten().numpy()) for g in range(2)]
    for g, dead in enumerate(deads):
        assert single[g].sum() == single[g][dead].sum()
        assert chisquare(single[g][dead]).pvalue > 1e-4
        assert chisquare([pairs[g][pair] for pair in itertools.combinations(dead, 2)]).pvalue > 1e-4
    assert chisquare(both[np.ix_(*deads)].ravel()).pvalue > 1e-4, "groups must not choose alike"


def test_the_hash_is_splitmix64_on_every_device():
    def splitmix64(state):
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    position = [0, 1, 2, 1000, 2**31, 2**32 - 1]
    for start in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        # the state of splitmix64 grows by its constant at each draw, so draw number p + 1 is the hash of position p
        expected = [splitmix64((start + (p - 1) * 0x9E3779B97F4A7C15) % 2**64) >> 33 for p in position]
        assert uniform_hash(start, torch.tensor(position)).tolist() == expected


def test_streams_differ_by_every_key():
    starts = [stream(seed, layer, event) for seed, layer, event in itertools.product(range(8), repeat=3)]
    assert len(set(starts)) == 512 and all(0 <= s < 2**64 for s in starts)


@pytest.mark.parametrize("score", [0.0, 1e-38, 1.5, 3.4e38])
def test_keys_give_back_score_and_position(score):
    positions = torch.tensor([0, 1, 2**31, 2**32 - 1])
    keys = growth.pack(growth.float_bits(torch.full((4,), score)), positions)
    assert (keys >= 0).all() and torch.equal(growth.positions_of(keys), positions)
    assert growth.scores_of(keys).tolist() == torch.full((4,), score).tolist()
    assert keys.argmax() == 0, "ties go to the lower position"


@pytest.mark.parametrize("score", [float("inf"), float("nan")])
def test_scores_that_are_not_finite_are_no_candidates(score):
    assert growth.float_bits(torch.tensor([score])).item() == -1


def test_sortable_integers_order_as_the_scores_do():
    scores = torch.tensor([3.0, -2.0, torch.inf, 0.0, 1e-40, -torch.inf, -0.5, torch.nan])
    order = torch.sort(sortable(scores), stable=True).indices
    assert order.tolist() == [5, 7, 1, 6, 3, 4, 0, 2]
    assert sortable(torch.tensor(-0.0)) == sortable(torch.tensor(0.0))
