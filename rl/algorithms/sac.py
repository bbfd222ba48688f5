"""Multi-task soft actor-critic: the losses, and the update of critics, actor, temperatures and target critics."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl.agents.mtsac import MTSACActor, MTSACCritics
from rl.algorithms.capture import Captured
from rl.algorithms.gaussian import gaussian
from rl.algorithms.learner import Learner, load_optimizer
from rl.algorithms.replay import Recent, Replay
from rl.config import Config

STATS = ("loss/policy", "loss/value", "sac/temperature", "sac/entropy", "sac/value")


class SAC:
    """Soft actor-critic (arXiv 1812.05905) with a temperature per task: its networks, and what an update does to them.

    What the paper leaves open is as in the code it builds on: Adam's epsilon is 1e-5, temperatures start at 1, the
    target entropy is minus the number of actions.
    """

    def __init__(self, config: Config, replay: Replay, num_tasks: int, observations: int, actions: int, device: str):
        self.config, self.replay, self.actions, self.device = config.sac, replay, actions, device
        captured = device == "cuda" and "pcgrad" not in config.treatment  # PCGrad counts tasks on the host
        adam = {"lr": config.sac.learning_rate, "eps": 1e-5, "fused": True, "capturable": captured}
        common = {"adam": adam, "max_gradient_norm": config.sac.max_gradient_norm, "device": device}
        actor = partial(MTSACActor, num_tasks, observations, actions)
        critics = partial(MTSACCritics, num_tasks, observations + actions)
        self.actor = Learner(config, "actor", actor, Recent(replay, with_actions=False), **common)
        self.critic = Learner(config, "critic", critics, Recent(replay, with_actions=True), **common, with_target=True)
        self.log_temperatures = nn.Parameter(torch.zeros(num_tasks, device=device))
        self.temperature_optimizer = torch.optim.Adam([self.log_temperatures], **adam)
        self._tasks = torch.arange(num_tasks, device=device).repeat_interleave(config.sac.batch)
        self._rows = torch.arange(len(self._tasks), device=device)
        self._captured = Captured(self.step) if captured else None

    def update(self, generator: torch.Generator) -> Tensor:
        """Take one step on a batch drawn from the replay; returns the STATS, detached, until the next call."""
        timesteps = self.replay.draw(self.config.batch, generator)
        noise = torch.randn(2, len(self._rows), self.actions, generator=generator, device=self.device)
        return self._captured(timesteps, noise) if self._captured else self.step(timesteps, noise, generator)

    def step(self, timesteps: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Take one step on these timesteps [num_tasks, M], with normal noise [2, N, actions] for next and new actions.

        Args:
            generator: for treatments that draw at every step.
        """
        config, batch = self.config, self.replay.batch(timesteps)
        temperatures = self.log_temperatures.detach().exp()[self._tasks]
        stats = {name: [] for name in STATS}  # in parts, where a treatment takes the loss of some rows at a time

        with torch.no_grad():
            actions, log_probs = squashed(self.actor.network(batch.next_observations), noise[0])
            values = self.critic.target(critics_see(batch.next_observations, actions)).amin(1)
            following = values - temperatures * log_probs
            targets = clipped(batch.rewards + config.gamma * (1 - batch.ended) * following, config.clip)
        inputs = critics_see(batch.observations, batch.actions)

        def value_loss(rows: Tensor) -> Tensor:
            values = clipped(self.critic.network(inputs[rows], self._tasks_of(rows)), config.clip)
            loss = F.mse_loss(values, targets[rows].unsqueeze(1).expand_as(values))
            stats["loss/value"].append(loss.detach())
            return loss

        def policy_loss(rows: Tensor) -> Tensor:
            observations, tasks = batch.observations[rows], self._tasks_of(rows)
            actions, of_actions = squashed(self.actor.network(observations, tasks), noise[1, rows])
            values = self.critic.network(critics_see(observations, actions), tasks).amin(1)
            log_probs[rows] = of_actions.detach()
            loss = (temperatures[rows] * of_actions - values).mean()
            stats["loss/policy"].append(loss.detach())
            stats["sac/value"].append(values.detach().mean())
            return loss

        self.critic.minimise(value_loss, self._rows, self._tasks, generator)
        with frozen(self.critic.network):
            self.actor.minimise(policy_loss, self._rows, self._tasks, generator)

        self.temperature_optimizer.zero_grad()
        temperature_loss(self.log_temperatures, self._tasks, log_probs, target_entropy=-self.actions).backward()
        self.temperature_optimizer.step()

        online, target = (list(network.parameters()) for network in (self.critic.network, self.critic.target))
        with torch.no_grad():
            torch._foreach_lerp_(target, online, config.tau)
        stats |= {"sac/temperature": [temperatures.mean()], "sac/entropy": [-log_probs.mean()]}
        return torch.stack([sum(stats[name]) / len(stats[name]) for name in STATS])

    def _tasks_of(self, rows: Tensor) -> Tensor | None:
        """Task ids as the networks take them: all rows are task by task, as many of each."""
        return None if len(rows) == len(self._tasks) else self._tasks[rows]

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Draw an action for one observation of every task [num_tasks, ...], from normal noise [num_tasks, actions]."""
        return squashed(self.actor.network(observations), noise)[0]

    @torch.no_grad()
    def best(self, observations: np.ndarray) -> np.ndarray:
        """The action of the mean, for one observation of every task."""
        return gaussian(self.actor.network(torch.from_numpy(observations).to(self.device)))[0].tanh().cpu().numpy()

    def rewire(self, clock: int) -> None:
        """Tell the treatment that `clock` timesteps have passed."""
        compactions = self._compactions()
        self.actor.rewire(clock)
        self.critic.rewire(clock)
        if self._captured and self._compactions() != compactions:
            self._captured.reset()

    def _compactions(self) -> int:
        return sum(getattr(rule, "compactions", 0) for rule in (*self.actor.rules, *self.critic.rules))

    def state_dict(self) -> dict:
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "log_temperatures": self.log_temperatures.detach(),
            "temperature_optimizer": self.temperature_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        with torch.no_grad():
            self.log_temperatures.copy_(state["log_temperatures"])
        load_optimizer(self.temperature_optimizer, state["temperature_optimizer"])


def critics_see(observations: Tensor, actions: Tensor) -> Tensor:
    """What critics see: [N, features + actions]."""
    return torch.cat((observations, actions), dim=1)


def clipped(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else values.clamp(-bound, bound)


def squashed(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions [N, actions] in (-1, 1), tanh of a Gaussian draw made of normal noise, and their log-densities [N]."""
    mean, log_std = gaussian(outputs)
    draw = mean + log_std.exp() * noise
    # log(1 - tanh(u)^2), the stretch of the squashing, in a form that does not round to log(0)
    stretch = 2 * (math.log(2) - draw - F.softplus(-2 * draw))
    return draw.tanh(), (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - stretch).sum(-1)


def temperature_loss(log_temperatures: Tensor, tasks: Tensor, log_probs: Tensor, target_entropy: float) -> Tensor:
    """Falls when a task's temperature rises while its entropy is below the target, or falls while it is above."""
    return -(log_temperatures[tasks] * (log_probs + target_entropy)).mean()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, no gradients of the network's parameters are computed."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
