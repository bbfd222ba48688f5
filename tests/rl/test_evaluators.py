"""rl/evaluators: what processes play is what is played here, their failures are told, and none outlives its use."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from brief import TASKS, act_by_precision, brief_mt10
from torch import nn

from rl.agents.mtsac import MTSACActor
from rl.algorithms.sac import best
from rl.envs.metaworld import ACTIONS, OBSERVATIONS
from rl.envs.workers import Workers
from rl.episodes import evaluate_mt10
from rl.evaluators import Evaluators

SEED, CLOCK, EPISODES = 3, 40, 3


@pytest.fixture
def policy():
    """That moves the hand a lot, each task in its own way."""
    policy = MTSACActor(10, 49, 4, block_size=1)
    nn.init.normal_(policy.heads.output.weight)
    return policy


def test_any_number_of_processes_plays_what_the_learner_would_play(policy):
    torch.set_num_threads(1)
    envs = Workers(brief_mt10(), OBSERVATIONS, ACTIONS, num_workers=1, info=("success",))
    try:
        returns, solved = evaluate_mt10(envs, partial(best, policy), EPISODES, SEED, CLOCK)
    finally:
        envs.close()
    assert (returns.std(1) > 0).all() and 0 < solved.mean() < 1
    evaluators = Evaluators(brief_mt10(), best, EPISODES, 2)  # of two episodes, and of one
    try:
        assert not np.array_equal(evaluators.play(policy, SEED, CLOCK + 1)[0], returns)
        found = evaluators.play(policy, SEED, CLOCK)
    finally:
        evaluators.close()
    np.testing.assert_array_equal(found[0], returns)
    np.testing.assert_array_equal(found[1], solved)


def test_products_are_as_precise_as_the_learners(policy):
    returns = []
    for precision in ("high", "highest"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        evaluators = Evaluators(brief_mt10(), act_by_precision, EPISODES, 1)
        torch.set_float32_matmul_precision(before)
        try:
            returns.append(evaluators.play(policy, SEED, CLOCK)[0])
        finally:
            evaluators.close()
    assert not np.array_equal(*returns)  # of hands that move and hands that do not


def test_there_are_no_more_processes_than_episodes():
    evaluators = Evaluators(brief_mt10(), best, EPISODES, 9)
    evaluators.close()
    assert len(pids(evaluators)) == EPISODES


def test_a_task_that_fails_is_named_and_ends_all_processes(policy):
    evaluators = Evaluators(brief_mt10(failing=TASKS[3]), best, EPISODES, 2)
    with pytest.raises(RuntimeError, match="died at task task 3 with exit code 1; its error is printed above"):
        evaluators.play(policy, SEED, CLOCK)
    assert not any(map(alive, pids(evaluators)))


def test_a_process_that_is_killed_is_told_with_the_task_it_was_at(policy):
    evaluators = Evaluators(brief_mt10("slow"), best, EPISODES, 2)
    playing = evaluators._evaluators[1]
    threading.Thread(target=kill_once_it_plays, args=(playing,)).start()
    with pytest.raises(RuntimeError, match=r"died at task task \d with exit code -9"):
        evaluators.play(policy, SEED, CLOCK)
    assert not any(map(alive, pids(evaluators)))


def test_processes_can_be_ended_during_an_evaluation(policy):
    evaluators, said = Evaluators(brief_mt10("slow"), best, EPISODES, 1), []

    def play():
        with pytest.raises(RuntimeError, match="closed during an evaluation"):
            evaluators.play(policy, SEED, CLOCK)
        said.append(True)

    waiting = threading.Thread(target=play)
    waiting.start()
    wait_until_it_plays(evaluators._evaluators[0])
    evaluators.close()
    waiting.join(timeout=10)
    assert said and not any(map(alive, pids(evaluators)))


def test_no_process_is_left_when_the_learner_is_killed_during_an_evaluation():
    code = f"""
import threading
from brief import brief_mt10
from rl.algorithms.sac import best
from rl.agents.mtsac import MTSACActor
from rl.evaluators import Evaluators
evaluators = Evaluators(brief_mt10("slow"), best, 5, 1)
threading.Thread(target=evaluators.play, args=(MTSACActor(10, 49, 4, 1), {SEED}, {CLOCK}), daemon=True).start()
while any(e.task.value < 5 for e in evaluators._evaluators):
    pass
print(*(e.process.pid for e in evaluators._evaluators), flush=True)
threading.Event().wait()
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'tests' / 'helpers'}{os.pathsep}{root}"}
    learner = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    evaluators = [int(pid) for pid in learner.stdout.readline().split()]
    assert len(evaluators) == 1
    os.kill(evaluators[0], signal.SIGINT)  # Ctrl-C reaches them too, and is the learner's to handle
    learner.kill()
    learner.wait(timeout=30)
    learner.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(alive, evaluators)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, evaluators))


def wait_until_it_plays(evaluator) -> None:
    """Environments are made one after the other, so the first comes again when they are played."""
    deadline = time.monotonic() + 60
    for task in (9, 0):
        while evaluator.task.value != task and time.monotonic() < deadline:
            time.sleep(1e-4)
    assert evaluator.task.value >= 0


def kill_once_it_plays(evaluator) -> None:
    wait_until_it_plays(evaluator)
    evaluator.process.kill()


def pids(evaluators) -> list[int]:
    return [evaluator.process.pid for evaluator in evaluators._evaluators]


def alive(pid: int) -> bool:
    """Whether there is such a process and it has not ended (as one that nobody waited for, a zombie, has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
