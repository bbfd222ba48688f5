"""Acting, and collecting what every task saw and did in lock-step."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rl.envs.pool import EnvPool
from rl.seeds import Stream, numpy_generator, torch_generator


@dataclass(frozen=True)
class Rollout:
    """T timesteps of n tasks; a tensor's row t holds what happened to all tasks in timestep t."""

    observations: Tensor  # uint8 [T, n, ...]
    actions: Tensor  # int64 [T, n]
    logits: Tensor  # float32 [T, n, num_actions], the policy that acted
    rewards: Tensor  # float32 [T, n]
    terminated: Tensor  # bool [T, n]: the episode ended here because of what happened, so nothing follows
    cut: Tensor  # bool [T, n]: time ran out, or the rollout ends here; the episode's value goes on
    next_observations: Tensor  # uint8 [T, n, ...]: what follows a cut timestep, stale elsewhere
    episode_returns: list[list[float]]  # per task, of the episodes that ended; undiscounted
    seconds: float  # wall time of all of it
    seconds_acting: float  # the part spent in the policy


def sample(logits: Tensor, exponential: Tensor) -> Tensor:
    """Draw from softmax(logits) in each row, as a race of standard exponential variables e: argmax of softmax / e."""
    return (logits - exponential.log()).argmax(-1)


@torch.no_grad()
def collect(pool: EnvPool, actor: nn.Module, num_tasks: int, steps: int, seed: int, clock: int) -> Rollout:
    """Let the actor step environments 0 .. num_tasks - 1 of the pool, one per task, from fresh episodes."""
    start = time.perf_counter()
    seconds_acting = 0.0
    envs = np.arange(num_tasks)
    task = torch.arange(num_tasks)
    shape, dtype = (steps, num_tasks), pool.observation_space.dtype
    observations = np.empty((*shape, *pool.observation_space.shape), dtype)
    next_observations = np.zeros_like(observations)
    actions = np.empty(shape, np.int64)
    rewards = np.empty(shape, np.float32)
    terminated, cut = np.empty(shape, bool), np.empty(shape, bool)
    logits = torch.empty(*shape, pool.action_space.n)
    # all the rollout's randomness in one call: a generator call per timestep would cost as much as the heads
    exponential = torch.empty_like(logits).exponential_(generator=torch_generator(seed, Stream.ROLLOUT, clock))
    running, episode_returns = np.zeros(num_tasks), [[] for _ in envs]

    current = pool.reset(envs, numpy_generator(seed, Stream.ROLLOUT, clock).integers(2**31, size=num_tasks))
    for t in range(steps):
        observations[t] = current
        acting = time.perf_counter()
        logits[t] = actor(torch.from_numpy(current), task)
        actions[t] = sample(logits[t], exponential[t]).numpy()
        seconds_acting += time.perf_counter() - acting
        step = pool.step(envs, actions[t])
        current, rewards[t], terminated[t], cut[t] = step.observations, step.rewards, step.terminated, step.truncated
        running += step.rewards
        ended = step.terminated | step.truncated
        if ended.any():
            next_observations[t, ended] = step.final_observations[ended]
            for i in ended.nonzero()[0]:
                episode_returns[i].append(float(running[i]))
            running[ended] = 0
    going_on = ~(terminated[-1] | cut[-1])
    next_observations[-1, going_on] = current[going_on]
    cut[-1] |= going_on

    arrays = (rewards, terminated, cut & ~terminated, next_observations)
    return Rollout(
        torch.from_numpy(observations),
        torch.from_numpy(actions),
        logits,
        *map(torch.from_numpy, arrays),
        episode_returns,
        time.perf_counter() - start,
        seconds_acting,
    )
