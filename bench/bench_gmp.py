"""A layer on its way from dense to sparse under GMP, in the state that the rule leaves it in at every density."""

from dataclasses import replace

import sparsekern as sk
from bench.case import SQUARE, THREADS, TINY, grid
from bench.training import check, dense_training, sparse_training, work

DENSITIES = (1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
CASES = {
    "smoke": grid([TINY], [16], [1, 0.5], [16]),
    "quick": grid([SQUARE], [256], [1, 0.8, 0.4, 0.05], [1, 16]),
    "full": grid([SQUARE], [256, 2048], DENSITIES, [1, 16], THREADS),
}
FINAL = DENSITIES[-1]


def pruned(case):
    """Train from density 1 with an event at each density of the sweep, down to the one of this case."""
    ours = sparse_training(replace(case, density=1))
    rule = sk.GMP(ours.layer, ours.optimizer, final_density=FINAL, end_step=1.0, update_every=1e-6)
    for density in (d for d in DENSITIES[1:] if d >= case.density):
        ours.step()
        rule.step(clock=1 - ((density - FINAL) / (1 - FINAL)) ** (1 / 3))  # the inverse of GMP's cubic ramp
    return ours


def bench_step(timer, record, case):
    ours, dense = pruned(case), dense_training(case)
    topology = ours.layer.topology
    assert abs(topology.density - case.density) < 0.02
    check(ours.layer, case.tokens)
    live = topology.num_live / topology.num_slots
    found = timer(ours.step, dense.step)
    record("step", partner="nn.Linear", **found, **work(case, products=3), live_slots=live)
