"""Whether time depends on where the live blocks are: training steps on other topologies against a random one."""

from dataclasses import dataclass

import sparsekern as sk
from bench import trained
from bench.case import SQUARE, THREADS, TINY, Case
from bench.training import Training, check, work
from sparsekern import Topology


@dataclass(frozen=True)
class TopologyCase(Case):
    """Its shape is that of all groups together."""

    topology: str


def balanced(shape: tuple[int, int], tokens: int, density: float, block_size: int, threads: int) -> TopologyCase:
    return TopologyCase(*shape, tokens, density, block_size, threads, "row-balanced")


def saved(block_size: int, threads: int) -> TopologyCase:
    """With the run's minibatch: 256 tokens of each task."""
    topology = trained.load(block_size)
    density = round(topology.density, 4)
    return TopologyCase(*topology.shape, 256, density, block_size, threads, "trained")


CASES = {
    "smoke": [balanced(TINY, 16, 0.5, 1, 1), saved(16, 1)],
    "quick": [balanced(SQUARE, 256, 0.1, 16, 1), saved(16, 1)],
    "full": [
        case
        for threads in THREADS
        for case in (
            *(balanced(SQUARE, 2048, 0.1, block_size, threads) for block_size in (1, 4, 16, 64)),
            *(balanced(SQUARE, tokens, 0.1, 16, threads) for tokens in (16, 256)),
            *(saved(block_size, threads) for block_size in trained.BLOCK_SIZES),
        )
    ],
}


def fullest(topology: Topology) -> dict[str, float]:
    """Live blocks of the fullest block row and block column, relative to the mean."""
    mask = topology.mask().float()
    counts = {"row": mask.sum(2), "column": mask.sum(1)}
    return {f"fullest_{name}": float(count.max() / count.mean()) for name, count in counts.items()}


def bench_step(compare, record, case):
    if case.topology == "trained":
        topology = trained.load(case.block_size)
    else:
        topology = Topology.random((case.out_features, case.in_features), case.density, case.block_size, balance="rows")
    random = Topology.random(topology.shape, topology.live_per_group(), case.block_size, topology.groups)
    ours, theirs = (sk.SparseLinear(case.in_features, case.out_features, topology=each) for each in (topology, random))
    check(ours, case)
    found = compare(Training(ours, case).step, Training(theirs, case).step)
    record(
        case.topology, partner="random", groups=topology.groups, **found, **work(ours, case.tokens), **fullest(topology)
    )
