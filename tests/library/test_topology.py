import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import BLOCK_SIZES, live_blocks, random_topology, rewire_at_random, topologies
from scipy.stats import chisquare

import sparsekern as sk


def assert_index_matches_coordinates(topology):
    layout, blocks = topology.layout, live_blocks(topology)
    dead = topology.num_slots - len(blocks)
    if topology.full:
        places = [(g, r, c) for g, r, c in np.ndindex(*topology.mask().shape)]
        rows, cols = topology.mask().shape[1:]
        assert topology.index.numel() == (-(-topology.num_slots // 32) if dead else 0)
        bits = np.unpackbits(topology.index.numpy().view(np.uint8), bitorder="little")
        live = {s for *_, s in blocks}
        assert set(np.flatnonzero(bits)) == {s for s in range(topology.num_slots) if dead and s not in live}
        assert {s: (g * rows + r, g * cols + c) for s, (g, r, c) in enumerate(places)}.items() >= {
            (s, (r, c)) for r, c, s in blocks
        }
        return
    by_col = sorted(blocks, key=lambda block: (block[1], block[0]))
    if topology.block_size == 1:
        for slots, order in ((layout.row_slots, blocks), (layout.col_slots, by_col)):
            assert slots[: len(blocks)].tolist() == [s for _, _, s in order]
            assert sorted(slots.tolist()) == list(range(topology.num_slots))
        return
    assert topology.index.dtype == torch.int32
    for pairs, offsets, order, expected, num_lines in (
        (layout.row_pairs, layout.row_offsets, layout.row_order, [(r, c, s) for r, c, s in blocks], layout.num_rows),
        (layout.col_pairs, layout.col_offsets, layout.col_order, [(c, r, s) for r, c, s in by_col], layout.num_cols),
    ):
        assert pairs[: len(blocks)].tolist() == [[minor, s] for _, minor, s in expected]
        assert pairs[len(blocks) :, 0].tolist() == [-1] * dead
        assert sorted(pairs[:, 1].tolist()) == list(range(topology.num_slots))
        count = np.bincount([major for major, _, _ in expected], minlength=num_lines)
        assert offsets.tolist() == [0, *count.cumsum()]
        assert sorted(order.tolist()) == list(range(num_lines))
        assert (np.diff(count[order.numpy()]) <= 0).all()
        assert pairs.data_ptr() % 8 == 0


@given(topologies())
def test_index_agrees_with_a_scan_of_the_coordinates(topology):
    assert_index_matches_coordinates(topology)


@given(topologies())
def test_mask_counts_and_density_agree_with_the_coordinates(topology):
    groups, (rows, cols) = topology.groups, (n // topology.groups for n in topology.grid)
    expected = np.zeros((groups, rows, cols), bool)
    blocks = live_blocks(topology)
    for r, c, _ in blocks:
        expected[r // rows, r % rows, c % cols] = True
    assert topology.mask().tolist() == expected.tolist()
    assert topology.num_live == len(blocks)
    assert topology.live_per_group() == expected.sum((1, 2)).tolist()
    assert topology.density == len(blocks) / (groups * rows * cols)
    again = sk.Topology.from_mask(topology.mask(), topology.shape, topology.block_size)
    assert torch.equal(again.mask(), topology.mask()) and again.num_slots == len(blocks)


@given(topologies(), st.integers(0, 1000))
def test_rebuild_after_a_rewire_in_place_equals_a_fresh_topology(topology, seed):
    if topology.full or topology.num_slots > topology.num_blocks:
        return
    address = topology.index.data_ptr()
    rewire_at_random(topology, seed)
    assert_index_matches_coordinates(topology)
    assert topology.index.data_ptr() == address


@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    groups=st.integers(1, 3),
    density=st.floats(0.001, 1.0),
    seed=st.integers(0, 1000),
)
def test_random_topology_has_the_rounded_count_and_covers_rows_and_columns(rows, cols, groups, density, seed):
    torch.manual_seed(seed)
    topology = sk.Topology.random((groups * rows * 4, groups * cols * 4 - groups), density, 4, groups)
    live = max(1, round(density * rows * cols))
    assert topology.live_per_group() == [live] * groups
    assert topology.num_slots == topology.num_live
    for mask in topology.mask():
        assert mask.sum() == live
        assert mask.any(1).sum() == min(rows, live)
        assert mask.any(0).sum() == min(cols, live)


def test_random_topology_has_no_favourite_places():
    counts = sum(sk.Topology.random((4, 6), 9, 1).mask()[0].int() for _ in range(2000))
    assert chisquare(counts.flatten()).pvalue > 1e-4


def test_random_topology_takes_a_live_count_per_group():
    assert sk.Topology.random((32, 48), [1, 6], 8, groups=2).live_per_group() == [1, 6]


def test_random_topology_repeats_with_the_seed_of_torch():
    def draw(seed):
        torch.manual_seed(seed)
        return sk.Topology.random((64, 64), 0.2, 4).mask()

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(("live", "least"), [(0, 1), (65, 1), ([64, 65], 0)])
def test_live_counts_that_no_group_can_have_are_refused(live, least):
    with pytest.raises(ValueError, match=f"from {least} to 64 blocks"):
        sk.Topology.random((16, 16), live, block_size=1, groups=2)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, 50.0, float("nan")])
def test_density_outside_zero_to_one_is_refused_with_its_value(density):
    with pytest.raises(ValueError, match=rf"density must be in \(0, 1\], got {density}"):
        sk.Topology.random((64, 64), density, 16)


@pytest.mark.parametrize("block_size", [0, -16, 3, 24, 256])
def test_block_size_must_be_a_power_of_two_up_to_128(block_size):
    with pytest.raises(ValueError, match=f"power of two from 1 to 128, got {block_size}"):
        sk.Topology.random((64, 64), 0.5, block_size)


@pytest.mark.parametrize(("shape", "groups", "message"), [((64, 65), 2, "in_features=65, groups=2"), ((0, 4), 1, "=0")])
def test_sizes_that_are_no_multiple_of_groups_are_refused(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        sk.Topology.random(shape, 0.5, 4, groups)


@pytest.mark.parametrize(
    ("rows", "cols", "message"),
    [
        ([0, 4], [0, 0], r"slot 1 has block \(4, 0\), outside the 4 x 2 blocks in 2 groups"),
        ([0, 1], [0, 2], r"slot 1 has block \(1, 2\)"),
        ([-2, 0], [0, 0], r"slot 0 has block \(-2, 0\)"),
        ([0, -1], [0, 1], r"slot 1 has block \(-1, 1\)"),
        ([0, 0], [0, 1], r"slot 1 has block \(0, 1\)"),
        ([1, 3, 1], [0, 1, 0], r"block \(1, 0\) is live in two slots"),
        ([0, 1], [0], r"one length, got shapes \(2,\) and \(1,\)"),
    ],
)
def test_coordinates_that_are_no_topology_are_refused(rows, cols, message):
    with pytest.raises(ValueError, match=message):
        sk.Topology(torch.tensor(rows), torch.tensor(cols), (16, 8), block_size=4, groups=2)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_slot_for_every_block_in_order_is_a_full_store_without_index(block_size):
    topology = sk.Topology.random((2 * 3 * block_size, 2 * 5 * block_size), 1.0, block_size, groups=2)
    assert topology.full and topology.index.numel() == 0
    assert_index_matches_coordinates(topology)
    topology.leave_full_store()
    assert not topology.full
    assert_index_matches_coordinates(topology)


def test_a_full_store_may_have_dead_slots_but_not_another_order():
    rows, cols = torch.arange(12) // 4, torch.arange(12) % 4
    dead = torch.arange(12) == 5
    assert sk.Topology(rows.masked_fill(dead, -1), cols.masked_fill(dead, -1), (12, 16), 4).full
    assert not sk.Topology(rows.flip(0), cols.flip(0), (12, 16), 4).full


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_index_costs_at_most_12_bytes_a_weight_at_block_1_and_little_above(block_size):
    topology = sk.Topology.random((1024, 512), 0.1, block_size)
    per_weight = topology.nbytes / (topology.num_slots * block_size**2)
    assert per_weight <= (12 if block_size == 1 else 8)


def test_coordinates_need_int32_only_on_grids_of_more_than_32767():
    assert sk.Topology.random((32767, 1), 1, 1).block_rows.dtype == torch.int16
    wide = sk.Topology(torch.tensor([0]), torch.tensor([32767]), (1, 32768), 1)
    assert wide.block_cols.dtype == torch.int32 and wide.mask().nonzero().tolist() == [[0, 0, 32767]]


@pytest.mark.parametrize("block_size", [1, 4])
def test_replace_takes_coordinates_of_another_number_in_the_same_tensors(block_size):
    topology, other = (random_topology((5, 7), block_size, 2, live, 1) for live in (0.2, 0.7))
    tensors = [id(t) for t in (topology.block_rows, topology.block_cols, topology.index)]
    topology.replace(other.block_rows, other.block_cols)
    assert [id(t) for t in (topology.block_rows, topology.block_cols, topology.index)] == tensors
    assert torch.equal(topology.mask(), other.mask())
    assert_index_matches_coordinates(topology)


@pytest.mark.parametrize(("row", "col"), [(9, 0), (0, 9), (-2, 0), (-1, 0), (2, 0)])
def test_a_rebuild_of_coordinates_outside_of_the_grid_is_refused(row, col):
    topology = random_topology((2, 3), 4, 2)
    with torch.no_grad():
        topology.block_rows[0], topology.block_cols[0] = row, col
    with pytest.raises(ValueError, match=rf"slot 0 has block \({row}, {col}\), outside the 4 x 6 blocks in 2 groups"):
        topology.rebuild()
