"""Rollouts: what every task saw and did in lock-step, collected from fresh episodes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rl.agents.policy import Policy
from rl.algorithms.gaussian import gaussian, log_probs
from rl.envs.metaworld import ACTIONS, MT10, OBSERVATIONS
from rl.envs.pool import EnvPool
from rl.envs.workers import Workers
from rl.seeds import Stream, numpy_generator, torch_generator

TASKS = torch.arange(len(MT10))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """T timesteps of n tasks. Row t of a [T, n] tensor is what happened to all tasks in timestep t."""

    actions: Tensor  # [T, n, ...]
    rewards: Tensor  # float32 [T, n]
    terminated: Tensor  # bool [T, n]: the episode ended here because of what happened, so nothing follows
    cut: Tensor  # bool [T, n]: time ran out, or the rollout ends here; what would have followed still has its value
    next_observations: Tensor  # [T, n, ...]: what the actions led to, be it the last of its episode
    episode_returns: list[list[float]]  # per task, of the episodes that ended; undiscounted
    seconds: float  # wall time of all of it
    seconds_acting: float  # the part spent in the policy

    def metrics(self, tasks: Sequence[str]) -> dict[str, float]:
        """The mean return of the episodes that ended, per task that had any, and the time that collecting took."""
        ended = zip(tasks, self.episode_returns, strict=True)
        return {f"rollout/{task}": sum(returns) / len(returns) for task, returns in ended if returns} | {
            "time/steps_per_second": self.rewards.numel() / self.seconds,
            "time/acting_ms": 1e3 * self.seconds_acting,
        }


@dataclass(frozen=True, kw_only=True)
class MiniGridRollout(Rollout):
    """What was seen is kept once: at (t, i) the task saw observations[seen[t, i]]. Actions are int64 [T, n]."""

    observations: Tensor  # uint8 [num_distinct, ...]
    tasks: Tensor  # int64 [num_distinct]: the task that an observation is of
    logits: Tensor  # float32 [num_distinct, num_actions], of the policy that acted
    seen: Tensor  # int64 [T, n]


@dataclass(frozen=True, kw_only=True)
class MT10Rollout(Rollout):
    """Actions, float32 [T, n, actions], are as drawn; the environment did what its box makes of them."""

    observations: Tensor  # float32 [T, n, features]
    log_probs: Tensor  # float32 [T, n]: of the actions, by the policy that drew them
    elapsed: Tensor  # int64 [T, n]: timesteps since the episode began
    solved: list[list[bool]]  # of the episodes that ended, whether any step had its task solved

    def metrics(self, tasks: Sequence[str]) -> dict[str, float]:
        """Also the share of the episodes that ended in which the task was solved at any step."""
        ended = zip(tasks, self.solved, strict=True)
        success = {f"rollout_success/{task}": sum(solved) / len(solved) for task, solved in ended if solved}
        return success | super().metrics(tasks)


def collect_minigrid(
    pool: EnvPool, actor: nn.Module, num_tasks: int, steps: int, seed: int, clock: int
) -> MiniGridRollout:
    """Let the actor step environments 0 .. num_tasks - 1 of the pool, one per task, from fresh episodes."""
    start = time.perf_counter()
    seconds_acting = 0.0
    generator = numpy_generator(seed, Stream.ROLLOUT, clock)
    policy, envs = Policy(actor), range(num_tasks)
    seen, actions = np.empty((2, steps, num_tasks), np.int64)
    rewards = np.empty((steps, num_tasks), np.float32)
    terminated, truncated = np.empty((2, steps, num_tasks), bool)
    current = pool.reset(envs, generator.integers(2**31, size=num_tasks))
    next_observations = np.empty((steps, *current.shape), current.dtype)
    for t in range(steps):
        acting = time.perf_counter()
        seen[t] = policy.rows(current, envs)
        actions[t] = policy.act(seen[t], generator)
        seconds_acting += time.perf_counter() - acting
        current, next_observations[t], rewards[t], terminated[t], truncated[t] = pool.step(envs, actions[t])

    return MiniGridRollout(
        observations=torch.from_numpy(np.stack(policy.observations)),
        tasks=torch.tensor(policy.tasks),
        logits=torch.from_numpy(np.stack(policy.logits)),
        seen=torch.from_numpy(seen),
        actions=torch.from_numpy(actions),
        **what_happened(rewards, terminated, truncated, next_observations),
        seconds=time.perf_counter() - start,
        seconds_acting=seconds_acting,
    )


@torch.no_grad()
def collect_mt10(envs: Workers, actor: nn.Module, steps: int, seed: int, clock: int) -> MT10Rollout:
    """Let the actor step all environments, from fresh episodes."""
    start = time.perf_counter()
    seconds_acting = 0.0
    noise = torch.randn(steps, len(MT10), *ACTIONS.shape, generator=torch_generator(seed, Stream.ROLLOUT, clock))
    observations, next_observations = np.empty((2, steps, len(MT10), *OBSERVATIONS.shape), np.float32)
    outputs = torch.empty(steps, len(MT10), 2 * ACTIONS.shape[0])
    actions = torch.empty_like(noise)
    rewards, solved = np.empty((2, steps, len(MT10)), np.float32)
    terminated, truncated = np.empty((2, steps, len(MT10)), bool)
    elapsed = np.zeros((steps + 1, len(MT10)), np.int64)
    seeds = numpy_generator(seed, Stream.RESET, clock).integers(2**31, size=len(MT10))
    current, _ = envs.reset(seed=seeds.tolist())
    for t in range(steps):
        acting = time.perf_counter()
        observations[t] = current
        outputs[t] = actor(torch.from_numpy(current), TASKS)
        mean, log_std = gaussian(outputs[t])
        actions[t] = mean + log_std.exp() * noise[t]
        clipped = actions[t].numpy().clip(ACTIONS.low, ACTIONS.high)
        seconds_acting += time.perf_counter() - acting
        current, rewards[t], terminated[t], truncated[t], infos = envs.step(clipped)
        next_observations[t], solved[t] = infos["final_obs"], infos["success"]
        elapsed[t + 1] = np.where(terminated[t] | truncated[t], 0, elapsed[t] + 1)

    times_solved = episode_sums(solved, terminated | truncated)
    return MT10Rollout(
        observations=torch.from_numpy(observations),
        actions=actions,
        log_probs=log_probs(outputs, actions),
        **what_happened(rewards, terminated, truncated, next_observations),
        elapsed=torch.from_numpy(elapsed[:-1]),
        solved=[[times > 0 for times in of_task] for of_task in times_solved],
        seconds=time.perf_counter() - start,
        seconds_acting=seconds_acting,
    )


def what_happened(rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, next_observations) -> dict:
    """What the environments returned, [T, n], as fields of a rollout, which cuts the episodes that its end meets."""
    cut = truncated.copy()
    cut[-1] = True
    return {
        "rewards": torch.from_numpy(rewards),
        "terminated": torch.from_numpy(terminated),
        "cut": torch.from_numpy(cut & ~terminated),
        "next_observations": torch.from_numpy(next_observations),
        "episode_returns": episode_sums(rewards, terminated | truncated),
    }


def episode_sums(values: np.ndarray, ended: np.ndarray) -> list[list[float]]:
    """For each of n tasks, the sums of its values, [T, n], over each episode that ended within them."""
    sums = []
    for of_task, ends in zip(values.T, ended.T, strict=True):
        ends = ends.nonzero()[0] + 1
        sums.append([float(episode.sum()) for episode in np.split(of_task, ends)[: len(ends)]])
    return sums
