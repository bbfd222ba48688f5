"""Replay: the latest transitions of every task, drawn uniformly per task."""

from typing import NamedTuple

import torch
from torch import Tensor

from rl.algorithms.buffer import BATCH, CAPACITY


class Batch(NamedTuple):
    """M transitions of every task."""

    observations: Tensor  # float32 [M, num_tasks, features]
    actions: Tensor  # float32 [M, num_tasks, actions]
    rewards: Tensor  # float32 [M, num_tasks]
    next_observations: Tensor  # float32 [M, num_tasks, features]
    ended: Tensor  # float32 [M, num_tasks]: 1 where nothing follows, else 0
    judged: Tensor  # float32 [M, num_tasks, features + actions]: what critics see, which stands side by side


class Replay:
    """One transition per task and timestep, first in, first out; on the learner's device.

    What belongs to a transition lies side by side: adding a timestep writes one row, a batch is gathered in one call.
    """

    def __init__(self, capacity: int, num_tasks: int, features: int, actions: int, device: str = "cpu"):
        self.num_tasks = num_tasks
        self.widths = (features, actions, 1, features, 1)
        self.capacity = capacity
        """Timesteps that have a place, from 0 on. A timestep that is written behind them, to this place, is lost."""
        # empty: memory is taken as it is filled
        self.storage = torch.empty(capacity + 1, num_tasks, sum(self.widths), device=device)
        self._tasks = torch.arange(num_tasks, device=device)
        self.added = 0
        """Timesteps since the start; the last `capacity` of them are here."""

    def __len__(self) -> int:
        """Timesteps here."""
        return min(self.added, self.capacity)

    def add(self, *transition: Tensor) -> None:
        """Add one timestep: observations, actions, rewards, next observations and ends, with one row per task."""
        device = self.storage.device
        self.write(torch.tensor([self.take_place()], device=device), *(part.float().to(device) for part in transition))

    def take_place(self) -> int:
        """Count one more timestep; returns its place, where it must be written before it can be drawn."""
        self.added += 1
        return (self.added - 1) % self.capacity

    def write(self, place: Tensor, *transition: Tensor) -> None:
        """Write one timestep, in any number of parts, to its place, int64 [1] on the device."""
        parts = [part.view(1, self.num_tasks, -1) for part in transition]
        self.storage.index_copy_(0, place, torch.cat(parts, dim=2))

    def draw(self, per_task: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps, each task's on its own, uniformly and with repetition: int64 [per_task, num_tasks].

        The generator is on the CPU, and so are they.
        """
        size = (self.num_tasks, per_task)  # drawn task by task
        return torch.randint(len(self), size, generator=generator).T

    def batch(self, timesteps: Tensor) -> Batch:
        """The transitions at these timesteps [M, num_tasks], of the task in whose column each stands."""
        transitions = self.storage[timesteps, self._tasks]
        observations, actions, rewards, following, ended = transitions.split(self.widths, dim=-1)
        judged = transitions[..., : sum(self.widths[:2])]
        return Batch(observations, actions, rewards.squeeze(-1), following, ended.squeeze(-1), judged)

    def state_dict(self) -> dict:
        """The filled part of the storage, on the CPU; of a storage that is there already, without copying it."""
        filled = self.storage[: len(self)].cpu()
        # through NumPy, because torch.save writes all of the memory that a slice is a view of
        filled = torch.from_numpy(filled.numpy())
        return {"storage": filled, "added": self.added, "capacity": self.capacity}

    def load_state_dict(self, state: dict) -> None:
        stored = state["storage"]
        capacity = state.get("capacity", len(stored))  # older checkpoints have the whole storage instead
        own, its = ([timesteps, *of.shape[1:]] for timesteps, of in ((self.capacity, self.storage), (capacity, stored)))
        if own != its:
            raise ValueError(f"Replay: the checkpoint's storage must be {own}, got {its}")
        self.added = state["added"]
        self.storage[: len(self)] = stored[: len(self)]


class Recent:
    """The plasticity buffer of off-policy agents: the latest 100,000 transitions of all tasks, out of the replay.

    Args:
        with_actions: what is looked at is what critics see, observations with actions; else observations.
    """

    def __init__(self, replay: Replay, with_actions: bool):
        self._replay, self._with_actions = replay, with_actions

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Up to 1024 different entries: what the networks see, float32, and tasks; generator: on the CPU."""
        replay = self._replay
        latest = min(len(replay), CAPACITY // replay.num_tasks)
        entries = torch.randperm(latest * replay.num_tasks, generator=generator)[:BATCH].to(replay.storage.device)
        timesteps = (replay.added - 1 - entries // replay.num_tasks) % replay.capacity
        tasks = entries % replay.num_tasks
        features, actions, *_ = replay.widths
        return replay.storage[timesteps, tasks, : features + actions * self._with_actions], tasks
