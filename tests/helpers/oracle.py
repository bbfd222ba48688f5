"""Slow NumPy references in float64, error measures, and hypothesis strategies that draw topologies."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import sparsekern as sk

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# Largest error of an element, as a share of the sum of its terms' absolute values: the rounding of the output, and for
# float64 and float32 that of the sums. float16 rounds to 2^-11 = 4.9e-4, bfloat16 to 2^-8 = 3.9e-3.
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def live_blocks(topology: sk.Topology) -> list[tuple[int, int, int]]:
    """(row, column, slot) of every live block, sorted."""
    coordinates = zip(topology.block_rows.tolist(), topology.block_cols.tolist(), strict=True)
    return sorted((r, c, s) for s, (r, c) in enumerate(coordinates) if r >= 0)


def dense_weight(weight: Tensor, topology: sk.Topology) -> np.ndarray:
    """W of every group, float64 [groups, out_per_group, in_per_group], block after block."""
    b, groups = topology.block_size, topology.groups
    (out, into), (rows, cols) = topology.shape, (n // groups for n in topology.grid)
    dense = np.zeros((groups, rows * b, cols * b))
    blocks = weight.detach().double().numpy()
    for r, c, s in live_blocks(topology):
        assert r // rows == c // cols, "a block outside its group"
        r, group, c = r % rows, r // rows, c % cols
        dense[group, r * b : (r + 1) * b, c * b : (c + 1) * b] = blocks[s]
    return dense[:, : out // groups, : into // groups]


def gather_blocks(dense: np.ndarray, topology: sk.Topology) -> np.ndarray:
    """The inverse of `dense_weight`: float64 [num_slots, B, B]; dead slots and padding are zero."""
    b, groups = topology.block_size, topology.groups
    rows, cols = (n // groups for n in topology.grid)
    padded = np.zeros((groups, rows * b, cols * b))
    padded[:, : dense.shape[1], : dense.shape[2]] = dense
    blocks = np.zeros((topology.num_slots, b, b))
    for r, c, s in live_blocks(topology):
        group, r, c = r // rows, r % rows, c % cols
        blocks[s] = padded[group, r * b : (r + 1) * b, c * b : (c + 1) * b]
    return blocks


def dds(x: np.ndarray, dense: np.ndarray, transpose: bool, offsets: list[int] | None = None) -> np.ndarray:
    """x Wᵀ or x W of 2-D x, group after group; with offsets, group after group of tokens."""
    matrices = dense.transpose(0, 2, 1) if transpose else dense
    if offsets is None:
        return np.concatenate([p @ m for p, m in zip(np.split(x, len(dense), 1), matrices, strict=True)], axis=1)
    return np.concatenate([x[a:b] @ m for a, b, m in zip(offsets[:-1], offsets[1:], matrices, strict=True)])


def outer(dy: np.ndarray, x: np.ndarray, groups: int, offsets: list[int] | None = None) -> np.ndarray:
    """dyᵀx of every group, [groups, out_per_group, in_per_group]."""
    if offsets is None:
        return np.stack([d.T @ p for d, p in zip(np.split(dy, groups, 1), np.split(x, groups, 1), strict=True)])
    return np.stack([dy[a:b].T @ x[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)])


def error(actual: Tensor, truth: np.ndarray, size: np.ndarray) -> float:
    """Largest |actual - truth| / size over the elements; `size` is the same result computed from absolute values."""
    difference = np.abs(actual.detach().double().numpy() - truth)
    assert difference.shape == size.shape, f"{difference.shape} instead of {size.shape}"
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where((size == 0) & (difference == 0), 0, difference / size)
    return float(share.max(initial=0)) if not np.isnan(share).any() else np.nan


def random_topology(grid, block_size, groups=1, live=0.4, dead=0, padding=(0, 0), seed=0) -> sk.Topology:
    """Live blocks in random slots, each place with probability `live` (per group grid), among `dead` dead slots.

    Nothing is arranged: rows and columns may be empty. `padding` is what the sizes lack to whole blocks.
    """
    rng = np.random.default_rng(seed)
    rows, cols = grid
    g, r, c = np.nonzero(rng.random((groups, rows, cols)) < live)
    slots = rng.permutation(len(g) + dead)[: len(g)]
    coordinates = np.full((2, len(g) + dead), -1)
    coordinates[0, slots], coordinates[1, slots] = g * rows + r, g * cols + c
    shape = tuple(groups * (n * block_size - pad) for n, pad in zip(grid, padding, strict=True))
    return sk.Topology(*torch.from_numpy(coordinates), shape, block_size, groups)


@st.composite
def topologies(draw, block_sizes=BLOCK_SIZES, max_side=6) -> sk.Topology:
    """Any topology of a small grid: empty and full rows, one block, every block, 1 x N, padding, groups, dead slots."""
    block_size = draw(st.sampled_from(block_sizes))
    sides = st.integers(1, max_side)
    pads = st.integers(0, block_size - 1)
    return random_topology(
        (draw(sides), draw(sides)),
        block_size,
        groups=draw(st.integers(1, 3)),
        live=draw(st.sampled_from((0.0, 0.1, 0.3, 0.6, 1.0))),
        dead=draw(st.integers(0, 3)),
        padding=(draw(pads), draw(pads)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def rewire_at_random(topology: sk.Topology, seed: int) -> None:
    """Give every slot, dead or live, another live block, in place, as a rewire does."""
    rng = np.random.default_rng(seed)
    rows, cols = (n // topology.groups for n in topology.grid)
    places = rng.choice(topology.num_blocks, topology.num_slots, replace=False)
    group, r, c = places // (rows * cols), places // cols % rows, places % cols
    with torch.no_grad():
        topology.block_rows.copy_(torch.from_numpy(group * rows + r))
        topology.block_cols.copy_(torch.from_numpy(group * cols + c))
    topology.rebuild()
