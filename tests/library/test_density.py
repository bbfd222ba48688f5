"""Uniform and ERK: live-block counts per layer for one density over all."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.rewire.density import DISTRIBUTIONS, erk, uniform

GRIDS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)
DENSITY = st.floats(0.001, 1.0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@given(layers=GRIDS, density=DENSITY)
def test_counts_sum_to_the_rounded_total_and_stay_within_every_layer(distribution, layers, density):
    blocks = [r * c for r, c in layers]
    counts = distribution(layers, density)
    assert sum(counts) == max(len(layers), round(density * sum(blocks)))
    assert all(1 <= count <= all_of_it for count, all_of_it in zip(counts, blocks, strict=True))


@given(layers=GRIDS, density=DENSITY)
def test_erk_densities_of_layers_neither_full_nor_minimal_follow_one_eps(layers, density):
    counts = erk(layers, density)
    inner = [(n, sum(d)) for n, d in zip(counts, layers, strict=True) if 2 < n < math.prod(d) - 1]
    for n, weight in inner:
        for other, other_weight in inner:  # n = eps * weight, each rounded by less than one block
            assert (n - 1) / weight <= (other + 1) / other_weight


@given(layers=GRIDS, density=DENSITY)
def test_uniform_gives_every_layer_the_density_up_to_one_block(layers, density):
    total = sum(r * c for r, c in layers)
    if all(density * r * c >= 1 for r, c in layers):
        exact = round(density * total) / total
        for count, (r, c) in zip(uniform(layers, density), layers, strict=True):
            assert abs(count - exact * r * c) < 1 + 1e-6 or count == 1


def test_erk_matches_the_solution_by_hand():
    # 60 live in the ratio 40 : 3 would give (1, 2) four blocks of its two: it becomes full
    assert erk([(20, 20), (1, 2)], 60 / 402) == [58, 2]
    assert erk([(10, 10), (3, 5)], 0.2) == [16, 7]


def test_erk_solves_again_when_the_second_solution_overflows_too():
    # 31 live: eps = 31 / 28 fills (1, 1); 30 / 26 fills nothing else: (1, 1), then 4 and 26 in the ratio 5 : 21
    assert erk([(1, 1), (1, 4), (20, 1)], 24 / 25) == [1, 4, 19]


def test_erk_counts_the_kernel_of_a_convolution_among_the_dims():
    # RigL: sum of all four dims over their product; (64 + 32 + 3 + 3) : (64 + 288) live weights in the two layers
    counts = erk([(64, 32, 3, 3), (64, 288)], 0.02)
    assert counts[0] / counts[1] == pytest.approx(102 / 352, rel=0.01)


def test_small_layers_keep_one_block_and_the_others_pay_for_it():
    counts = uniform([(1, 1)] * 5 + [(10, 10)], 0.1)
    assert counts == [1] * 5 + [5]


def test_more_layers_than_blocks_to_share_gives_each_one():
    assert erk([(3, 3)] * 4, 0.01) == [1] * 4


def test_no_layers_share_nothing():
    assert erk([], 0.5) == []


def test_equal_layers_get_the_spare_blocks_in_order():
    assert uniform([(1, 3)] * 3, 4 / 9) == [2, 1, 1]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_a_density_outside_the_unit_interval_is_refused(density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got"):
        erk([(4, 4)], density)
