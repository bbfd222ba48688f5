"""What an event of SET or RigL costs a layer, against one ordinary training step of the same layer."""

import sparsekern as sk
from bench.case import SQUARE, THREADS, TINY, grid
from bench.training import sparse_training

CASES = {
    "smoke": grid([TINY], [16], [0.5], [1, 16]),
    "quick": grid([SQUARE], [256], [0.1], [1, 16]),
    "full": grid([SQUARE], [256, 2048], [0.1], [1, 4, 16, 64], THREADS),
}


def bench_set(timer, record, case):
    ours = sparse_training(case)
    rule = sk.SET(ours.layer, ours.optimizer, update_every=1)
    ours.step()
    record("SET", partner="a training step", **timer(rule.step, ours.step))


def bench_rigl(timer, record, case):
    """RigL also scores dead blocks in the backward of its step, so steps with and without an event are compared."""
    ours = sparse_training(case)
    rule = sk.RigL(ours.layer, ours.optimizer, update_every=2)

    def step():
        ours.step()
        rule.step()

    found = timer(step, step)
    assert rule.events == rule.clock // 2
    plain = found["partner_us"]
    cost = found["time_us"] - plain
    record(
        "RigL", partner="a training step", time_us=cost, partner_us=plain, ratio=plain / cost, rounds=found["rounds"]
    )
