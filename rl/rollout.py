"""Acting, and collecting what every task saw and did in lock-step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rl.envs.pool import EnvPool
from rl.seeds import Stream, numpy_generator


class Policy:
    """An actor whose weights rest, and which is therefore asked only once about what a task sees again and again.

    In thousands of timesteps a task shows some hundred distinct observations. Each is a row of `observations`, `tasks`
    and `logits`, in the order in which they were met.
    """

    def __init__(self, actor: nn.Module):
        self._actor = actor
        self._row_of: dict[bytes, int] = {}
        self.observations: list[np.ndarray] = []
        self.tasks: list[int] = []
        self.logits: list[np.ndarray] = []

    @torch.no_grad()
    def rows(self, observations: np.ndarray, tasks: Sequence[int]) -> list[int]:
        """Find the row of each of these N observations, with one call of the actor for those not met before."""
        keys = [bytes((task,)) + o.tobytes() for o, task in zip(observations, tasks, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self._row_of}
        if new:
            met, of = observations[list(new.values())], [tasks[i] for i in new.values()]
            self.logits += [*self._actor(torch.from_numpy(met), torch.tensor(of)).numpy()]
            self.observations += [*met]
            self.tasks += of
            self._row_of |= zip(new, range(len(self._row_of), len(self.tasks)), strict=True)
        return [self._row_of[key] for key in keys]

    def act(self, rows: Sequence[int], generator: np.random.Generator) -> np.ndarray:
        """Draw an action for each row: int64 [N]."""
        logits = np.stack([self.logits[row] for row in rows])
        return (logits + generator.gumbel(size=logits.shape)).argmax(-1)  # Gumbel's trick: a draw from softmax(logits)


@dataclass(frozen=True)
class Rollout:
    """T timesteps of n tasks. Row t of a [T, n] tensor is what happened to all tasks in timestep t.

    What was seen is kept once: at (t, i) the task saw observations[seen[t, i]].
    """

    observations: Tensor  # uint8 [num_distinct, ...]
    tasks: Tensor  # int64 [num_distinct]: the task that an observation is of
    logits: Tensor  # float32 [num_distinct, num_actions], of the policy that acted
    seen: Tensor  # int64 [T, n]
    actions: Tensor  # int64 [T, n]
    rewards: Tensor  # float32 [T, n]
    terminated: Tensor  # bool [T, n]: the episode ended here because of what happened, so nothing follows
    cut: Tensor  # bool [T, n]: time ran out, or the rollout ends here; what would have followed still has its value
    next_observations: Tensor  # uint8 [T, n, ...]: what the actions led to, be it the last of its episode
    episode_returns: list[list[float]]  # per task, of the episodes that ended; undiscounted
    seconds: float  # wall time of all of it
    seconds_acting: float  # the part spent in the policy


def collect(pool: EnvPool, actor: nn.Module, num_tasks: int, steps: int, seed: int, clock: int) -> Rollout:
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

    cut = truncated.copy()
    cut[-1] = True
    distinct = (np.stack(policy.observations), np.array(policy.tasks), np.stack(policy.logits))
    happened = (seen, actions, rewards, terminated, cut & ~terminated, next_observations)
    return Rollout(
        *map(torch.from_numpy, distinct + happened),
        episode_returns=[episode_returns(rewards[:, i], (terminated | truncated)[:, i]) for i in envs],
        seconds=time.perf_counter() - start,
        seconds_acting=seconds_acting,
    )


def episode_returns(rewards: np.ndarray, ended: np.ndarray) -> list[float]:
    """Undiscounted returns of the episodes of one task that ended within its rewards [T]."""
    ends = ended.nonzero()[0] + 1
    return [float(episode.sum()) for episode in np.split(rewards, ends)[: len(ends)]]
