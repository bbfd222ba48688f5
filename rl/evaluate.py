"""Evaluation: fixed numbers of whole episodes per task, on a random stream of their own."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from rl.envs.minigrid import Task
from rl.envs.pool import EnvPool
from rl.rollout import Policy
from rl.seeds import Stream, numpy_generator


def evaluate(pool: EnvPool, actor: nn.Module, num_tasks: int, episodes: int, seed: int, clock: int) -> np.ndarray:
    """Play `episodes` episodes of every task at once; undiscounted returns [num_tasks, episodes].

    The policy is sampled, as the paper has it. Environment e * num_tasks + i of the pool plays task i's episode e,
    and is no longer stepped when that has ended.
    """
    policy = Policy(actor)
    playing = np.arange(num_tasks * episodes)
    returns = np.zeros(len(playing))
    generator = numpy_generator(seed, Stream.EVALUATION, clock)
    current = pool.reset(playing, generator.integers(2**31, size=len(playing)))
    while len(playing):
        rows = policy.rows(current, (playing % num_tasks).tolist())
        step = pool.step(playing, policy.act(rows, generator))
        returns[playing] += step.rewards
        going_on = ~(step.terminated | step.truncated)
        playing, current = playing[going_on], step.observations[going_on]
    return returns.reshape(episodes, num_tasks).T


def judge(tasks: Sequence[Task], returns: np.ndarray) -> dict[str, float]:
    """Evaluated returns [num_tasks, episodes] as metrics: mean return, normalised return and success of each task."""
    metrics = {}
    for task, of_task in zip(tasks, returns, strict=True):
        metrics[f"return/{task.name}"] = of_task.mean()
        metrics[f"score/{task.name}"] = task.score(of_task.mean())
        metrics[f"success/{task.name}"] = np.mean([task.solved(r) for r in of_task])
    for kind in ("score", "success"):
        metrics[f"{kind}/mean"] = np.mean([metrics[f"{kind}/{task.name}"] for task in tasks])
    return metrics
