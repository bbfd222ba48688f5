"""Timestep: what the learner's device does while the environments step.

  add     the transition that the last actions made joins the replay
  act     actions for what the environments show are drawn and copied out, and the environments begin to step
  update  meanwhile the networks learn from a batch of the replay

On a GPU these are two CUDA graphs. The host writes what arrived into pinned memory, launches both, and waits for the
first only. (An event inside of one graph would not do: until its turn comes, the host may see that of the launch
before.) All random numbers are drawn on the host, those of an update while the one before goes on. So the graphs have
fewer kernels, and a seed draws the same on every device.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from rl.algorithms.capture import Captured
from rl.algorithms.sac import SAC, STATS


class Timestep:
    """`begin`; at each timestep of an episode `start`, then `finish`, then `arrive`; and `end`."""

    def __init__(self, agent: SAC):
        self._agent, self.replay, device = agent, agent.replay, agent.device
        tasks, (features, actions, *outcome), batch = self.replay.num_tasks, self.replay.widths, agent.config.batch
        self._parcel = Parcel(
            device,
            place=((1,), torch.int64),
            outcome=((tasks, sum(outcome)), torch.float32),
            observations=((tasks, features), torch.float32),
            acting_noise=((tasks, actions), torch.float32),
            timesteps=((batch, tasks), torch.int64),
            noise=((2, tasks, batch, actions), torch.float32),
        )
        self._observations = torch.zeros(tasks, features, device=device)
        self._actions = torch.zeros(tasks, actions, device=device)
        self._leaving = torch.zeros(tasks, actions, pin_memory=device == "cuda")
        self._left = torch.cuda.Event() if device == "cuda" else None
        self.stats = torch.zeros(len(STATS), device=device)
        """The sums, over the updates since `begin`, of what SAC.step returns."""
        self._graphs = (Captured(self._act), Captured(self._update)) if agent.captured else None
        self._compactions = agent.compactions

    def begin(self, generator: torch.Generator) -> None:
        """Begin to act; the generator, on the CPU, draws for the updates."""
        self._generator = generator
        self.stats.zero_()
        self._parcel.host.place.fill_(self.replay.capacity)  # where it is lost: nothing has arrived yet
        self._draw()

    def start(self, observations: np.ndarray, noise: Tensor) -> np.ndarray:
        """Begin a timestep; returns the actions [num_tasks, actions], which the next call overwrites.

        Args:
            observations: float32 [num_tasks, features].
            noise: normal, [num_tasks, actions], on the CPU.
        """
        self._parcel.host.observations.copy_(torch.from_numpy(observations))
        self._parcel.host.acting_noise.copy_(noise)
        if self._graphs and self._compactions != self._agent.compactions:
            self._compactions = self._agent.compactions
            for graph in self._graphs:
                graph.reset()
        act, update = self._graphs or (self._act, None)
        act()
        if self._left:
            self._left.record()
        if update:  # before the host waits, so that the device does not
            update()
        if self._left:
            self._left.synchronize()
        return self._leaving.numpy()

    def finish(self) -> None:
        """End the update."""
        if self._graphs is None:
            self._update()
        self._parcel.host.place.fill_(self.replay.take_place())
        self._draw()
        self._wait()

    def arrive(self, rewards: np.ndarray, following: np.ndarray, ended: np.ndarray) -> None:
        """Note what the actions led to: [num_tasks], [num_tasks, features] and [num_tasks]."""
        outcome = self._parcel.host.outcome.numpy()
        outcome[:, 0], outcome[:, 1:-1], outcome[:, -1] = rewards, following, ended

    def end(self) -> None:
        """Add what arrived last."""
        self._parcel.send()
        self._add()
        self._wait()

    def _draw(self) -> None:
        timesteps, noise = self._agent.draw(self._generator)
        self._parcel.host.timesteps.copy_(timesteps)
        self._parcel.host.noise.copy_(noise)

    def _wait(self) -> None:
        """For the device, which reads pinned memory."""
        if self._left:
            torch.cuda.current_stream().synchronize()

    def _act(self) -> None:
        self._parcel.send()
        self._add()
        arrived = self._parcel.device
        self._observations.copy_(arrived.observations)
        self._actions.copy_(self._agent.act(self._observations, arrived.acting_noise))
        self._leaving.copy_(self._actions, non_blocking=True)

    def _add(self) -> None:
        arrived = self._parcel.device
        self.replay.write(arrived.place, self._observations, self._actions, arrived.outcome)

    def _update(self) -> None:
        arrived = self._parcel.device
        self.stats += self._agent.step(arrived.timesteps, arrived.noise, self._generator)


class Parcel:
    """Tensors that go to a device in one copy: `host` and `device` have them as attributes, one memory on a CPU.

    Args:
        parts: shape and dtype of each.
    """

    def __init__(self, device: str, **parts: tuple[tuple[int, ...], torch.dtype]):
        sizes = [-(-math.prod(shape) * dtype.itemsize // 8) * 8 for shape, dtype in parts.values()]  # bytes; aligned
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device == "cuda")
        self._device = self._host if device == "cpu" else self._host.to(device)

        def views(memory: Tensor) -> SimpleNamespace:
            found = {}
            for (name, (shape, dtype)), part in zip(parts.items(), memory.split(sizes), strict=True):
                found[name] = part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            return SimpleNamespace(**found)

        self.host, self.device = views(self._host), views(self._device)

    def send(self) -> None:
        """Copy what the host has to the device, without waiting; the host must not change it until that is done."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
