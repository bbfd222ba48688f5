"""What an event of SET, RigL or GMP costs a layer, against one ordinary training step of the same layer."""

from dataclasses import replace

import pytest

import sparsekern as sk
from bench.case import SQUARE, THREADS, TINY, Case, Sizes, grid, wide_cases
from bench.training import Training, sparse_layer, sparse_training

CASES = {
    "smoke": grid([TINY], [16], [0.5], [1, 16]),
    "quick": grid([SQUARE], [256], [0.1], [1, 16]),
    "full": [
        *grid([SQUARE], [256], [0.1], [1, 4, 16, 64]),
        *grid([SQUARE], [2048], [0.1], [1, 4, 16, 64], THREADS),
    ],
}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return wide_cases(sizes)


@pytest.mark.clocks("graph", "host", "launch")
def bench_set(compare, record, case):
    ours = sparse_training(case)
    rule = sk.SET(ours.layer, ours.optimizer, update_every=1)
    ours.step()
    record("SET", partner="a training step", **compare(rule.step, ours.step))


@pytest.mark.device("cpu")
def bench_rigl(compare, record, case):
    """RigL also scores dead blocks in the backward of its step, so steps with and without an event are compared."""
    ours = sparse_training(case)
    rule = sk.RigL(ours.layer, ours.optimizer, update_every=2)

    def step():
        ours.step()
        rule.step()

    found = compare(step, step)
    assert rule.events == rule.clock // 2
    plain = found["partner_us"]
    cost = found["time_us"] - plain
    record(
        "RigL", partner="a training step", time_us=cost, partner_us=plain, ratio=plain / cost, rounds=found["rounds"]
    )


@pytest.mark.device("cpu")
def bench_gmp(compare, record, case):
    """An event that drops half of the live blocks, so that the layer is compacted to the case's density."""
    ours = sparse_training(case)
    rules = []

    def half_way():
        twice = replace(case, density=2 * case.density)
        training = Training(sparse_layer(twice), twice)
        training.step()
        rules.append(sk.GMP(training.layer, training.optimizer, final_density=case.density, end_step=1))

    found = compare(lambda: rules[-1].step(), ours.step, before=half_way)
    assert all(rule.compactions == 1 for rule in rules)
    record("GMP, compacting", partner="a training step", **found)
