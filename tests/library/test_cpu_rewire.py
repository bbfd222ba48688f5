"""Rewiring in C++ on a CPU: integer for integer what the torch operations compute."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import topologies

from sparsekern.backends import cpu
from sparsekern.layout import build_index
from sparsekern.rewire.select import random_candidates, weakest
from sparsekern.topology import Topology

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=str(cpu.unavailable()))


def both(function, *args):
    """What C++ and what torch answers."""
    found = function(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_C", None)
        patch.setattr(cpu, "_import_error", "a test is without it", raising=False)
        patch.setattr("sparsekern.layout._C", None)
        return found, function(*args)


@settings(max_examples=200)
@given(topologies(block_sizes=(1, 4)), st.integers(0, 2**64 - 1), st.randoms(use_true_random=False))
def test_selections_and_index_are_those_of_torch(topology, start, draw):
    layout = topology.layout
    live, places = topology.live_per_group(), topology.num_blocks // topology.groups
    choices = [0.0, -0.0, 0.5, 1.0, 1e-40, -2.0, float("inf"), float("-inf"), float("nan")]
    scores = torch.tensor([draw.choice([*choices, draw.random()]) for _ in range(layout.num_slots)])
    for found, expected in (
        both(weakest, scores, layout, live, [draw.randint(0, n) for n in live]),
        both(random_candidates, layout, draw.randint(0, places), start),
        both(build_index, layout),
    ):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_large_unstructured_layer_is_rewired_as_by_torch():
    own = Topology.random((500, 700), 0.05, 1)
    scores = torch.randn(own.num_slots).abs()
    for found, expected in (
        both(weakest, scores, own.layout, [own.num_slots], [own.num_slots // 3]),
        both(random_candidates, own.layout, own.num_slots // 3, random.Random(1).getrandbits(64)),
        both(build_index, own.layout),
    ):
        assert torch.equal(found, expected)


def test_more_blocks_than_are_live_are_refused():
    own = Topology.random((32, 32), 0.25, 16)
    with pytest.raises(ValueError, match="asked for 2 blocks of group 0, which has 1"):
        weakest(torch.zeros(1), own.layout, [1], [2])
