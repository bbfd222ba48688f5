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
    rewards: Tensor  # float32 [T, n]
    terminated: Tensor  # bool [T, n]: the episode ended here because of what happened, so nothing follows
    cut: Tensor  # bool [T, n]: time ran out, or the rollout ends here; what would have followed still has its value
    next_observations: Tensor  # uint8 [T, n, ...]: what the actions led to, be it the last of its episode
    logits: Tensor  # float32 [T, n, num_actions], of the policy that acted
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
    envs = range(num_tasks)
    space = pool.observation_space
    observations = np.empty((steps, num_tasks, *space.shape), space.dtype)
    next_observations = np.empty_like(observations)
    actions = np.empty((steps, num_tasks), np.int64)
    rewards = np.empty((steps, num_tasks), np.float32)
    terminated, truncated = np.empty((2, steps, num_tasks), bool)
    logits = torch.empty(steps, num_tasks, int(pool.action_space.n))
    # all the rollout's randomness in one call: a call per timestep would cost as much as the heads
    exponential = torch.empty_like(logits).exponential_(generator=torch_generator(seed, Stream.ROLLOUT, clock))

    current = pool.reset(envs, numpy_generator(seed, Stream.ROLLOUT, clock).integers(2**31, size=num_tasks))
    for t in range(steps):
        observations[t] = current
        acting = time.perf_counter()
        logits[t] = actor(torch.from_numpy(current))
        actions[t] = sample(logits[t], exponential[t]).numpy()
        seconds_acting += time.perf_counter() - acting
        current, next_observations[t], rewards[t], terminated[t], truncated[t] = pool.step(envs, actions[t])

    cut = truncated.copy()
    cut[-1] = True
    arrays = (observations, actions, rewards, terminated, cut & ~terminated, next_observations)
    return Rollout(
        *map(torch.from_numpy, arrays),
        logits=logits,
        episode_returns=[episode_returns(rewards[:, i], (terminated | truncated)[:, i]) for i in envs],
        seconds=time.perf_counter() - start,
        seconds_acting=seconds_acting,
    )


def episode_returns(rewards: np.ndarray, ended: np.ndarray) -> list[float]:
    """Undiscounted returns of the episodes of one task that ended within its rewards [T]."""
    ends = ended.nonzero()[0] + 1
    return [float(episode.sum()) for episode in np.split(rewards, ends)[: len(ends)]]
