"""Episodes of an evaluation: fixed numbers of whole ones per task, on a random stream of their own."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from rl.agents.policy import Policy
from rl.envs.minigrid import Task
from rl.envs.pool import EnvPool
from rl.envs.workers import SameProcess, Workers
from rl.seeds import Stream, numpy_generator


def evaluate_minigrid(
    pool: EnvPool, actor: nn.Module, num_tasks: int, episodes: int, seed: int, clock: int
) -> np.ndarray:
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


def minigrid_metrics(tasks: Sequence[Task], returns: np.ndarray, solved: np.ndarray) -> dict[str, float]:
    """Returns and whether each was solved, [num_tasks, episodes], as metrics: return, its share of an optimal one's,
    and success of each task."""
    metrics = {}
    for task, of_task, of_solved in zip(tasks, returns, solved, strict=True):
        metrics[f"return/{task.name}"] = of_task.mean()
        metrics[f"score/{task.name}"] = task.score(of_task.mean())
        metrics[f"success/{task.name}"] = of_solved.mean()
    for kind in ("score", "success"):
        metrics[f"{kind}/mean"] = np.mean([metrics[f"{kind}/{task.name}"] for task in tasks])
    return metrics


def evaluate_mt10(
    envs: Workers | SameProcess,
    act: Callable[[np.ndarray], np.ndarray],
    episodes: int,
    seed: int,
    clock: int,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Play `episodes` episodes of each of MT10's tasks, as `metaworld.evaluation.evaluation` does (50 are usual).

    An episode ends when its task is solved, or after 500 steps, and its goal is drawn from the environment's 50. A task
    whose episodes have been played is no longer stepped, which the official function does for naught.

    Args:
        envs: of all tasks; none may be within an episode that matters: reset them before they are trained on again.
        act: from observations [10, 49] to actions [10, 4]; row i is of task i, whether that is still played or not.
        first: of the episodes of this seed and clock, which of each task to begin with.
    Returns:
        Undiscounted returns [10, episodes], and whether the last step of each had its task solved, bool [10, episodes].
    """
    generator = numpy_generator(seed, Stream.EVALUATION, clock)
    envs.call("toggle_terminate_on_success", True)
    current, _ = envs.reset(seed=generator.integers(2**31, size=envs.num_envs))
    for _ in range(first):  # an episode draws from its environment's stream when it begins, and never again
        current, _ = envs.reset()
    returns = np.zeros((envs.num_envs, episodes))
    solved = np.zeros((envs.num_envs, episodes), bool)
    played = np.zeros(envs.num_envs, int)  # whole episodes
    while (playing := np.flatnonzero(played < episodes)).size:
        current, rewards, _, _, infos = envs.step(act(current), mask=played < episodes)
        returns[playing, played[playing]] += rewards[playing]
        solved[playing, played[playing]] = infos["success"][playing]
        played += infos["_final_obs"]
    envs.call("toggle_terminate_on_success", False)
    return returns, solved


def mt10_metrics(names: Sequence[str], returns: np.ndarray, solved: np.ndarray) -> dict[str, float]:
    """What `evaluate_mt10` returned as metrics: mean return and success of each task; the score is the success."""
    metrics = {f"return/{name}": of_task.mean() for name, of_task in zip(names, returns, strict=True)}
    for kind in ("score", "success"):
        metrics |= {f"{kind}/{name}": of_task.mean() for name, of_task in zip(names, solved, strict=True)}
        metrics[f"{kind}/mean"] = solved.mean()
    return metrics
