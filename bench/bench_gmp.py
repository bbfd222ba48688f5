"""A layer on its way from dense to sparse under GMP, in the state that the rule leaves it in at every density."""

from dataclasses import replace
from functools import lru_cache

import sparsekern as sk
from bench.case import SQUARE, THREADS, Case, grid
from bench.training import Training, check, dense_training, sparse_training, work

DENSITIES = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
CASES = {
    "smoke": grid([SQUARE], [16], [1, 0.4], [16]),
    "quick": grid([SQUARE], [256], [1, 0.8, 0.4, 0.05], [1, 16]),
    "full": grid([SQUARE], [256, 2048], DENSITIES, [1, 16], THREADS),
}
FINAL = DENSITIES[-1]


@lru_cache(maxsize=1)
def run(dense: Case) -> tuple[Training, sk.GMP]:
    """A run that has not begun to prune; its cases follow each other, from dense to sparse."""
    ours = sparse_training(dense)
    return ours, sk.GMP(ours.layer, ours.optimizer, final_density=FINAL, end_step=1.0, update_every=1e-6)


def pruned(case: Case) -> Training:
    """Train with an event at each density of the sweep, down to the one of this case."""
    ours, rule = run(replace(case, density=1))
    for density in DENSITIES:
        clock = 1 - ((density - FINAL) / (1 - FINAL)) ** (1 / 3)  # the inverse of GMP's cubic ramp
        if clock > rule.clock and density >= case.density:
            ours.step()
            rule.step(clock=clock)
    return ours


def bench_step(compare, record, case):
    ours, dense = pruned(case), dense_training(case)
    topology = ours.layer.topology
    assert abs(topology.density - case.density) < 0.02
    check(ours.layer, case)
    live = topology.num_live / topology.num_slots
    found = compare(ours.step, dense.step)
    record("step", partner="nn.Linear", **found, **work(ours.layer, case.tokens), live_slots=live)
