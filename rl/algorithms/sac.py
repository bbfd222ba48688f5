"""Multi-task soft actor-critic: the losses, and the update of critics, actor, temperatures and target critics."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl.agents.mtsac import MTSACActor, MTSACCritics
from rl.algorithms.gaussian import Squash, gaussian
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
        self.captured = device == "cuda" and "pcgrad" not in config.treatment  # PCGrad counts tasks on the host
        """Whether a step may be a CUDA graph."""
        adam = {"lr": config.sac.learning_rate, "eps": 1e-5, "fused": True, "capturable": self.captured}
        common = {"adam": adam, "max_gradient_norm": config.sac.max_gradient_norm, "device": device}
        actor = partial(MTSACActor, num_tasks, observations, actions)
        critics = partial(MTSACCritics, num_tasks, observations + actions)
        self.actor = Learner(config, "actor", actor, Recent(replay, with_actions=False), **common)
        self.critic = Learner(config, "critic", critics, Recent(replay, with_actions=True), **common, with_target=True)
        self.log_temperatures = nn.Parameter(torch.zeros(num_tasks, device=device))
        self.temperature_optimizer = torch.optim.Adam([self.log_temperatures], **adam)
        self._tasks = torch.arange(num_tasks, device=device).repeat(config.sac.batch)
        self._rows = torch.arange(len(self._tasks), device=device)
        self._minus_target = torch.full((num_tasks,), actions / num_tasks, device=device)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps of the replay and noise for a step, both on the CPU, as the generator is."""
        size = 2, len(self.log_temperatures), self.config.batch, self.actions
        return self.replay.draw(self.config.batch, generator), torch.randn(size, generator=generator)

    def update(self, generator: torch.Generator) -> Tensor:
        """Draw, and take a step."""
        return self.step(*(drawn.to(self.device) for drawn in self.draw(generator)), generator)

    def step(self, timesteps: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Update all networks once, with these timesteps [M, num_tasks]; returns the STATS, detached.

        Args:
            noise: normal, [2, num_tasks, M, actions], for the next and for the new actions.
            generator: for treatments that draw at every step.
        """
        config, batch, noise = self.config, self.replay.batch(timesteps), noise.transpose(1, 2)
        temperatures = self.log_temperatures.detach().exp()
        value_losses, policy_losses, judged = [], [], []  # in parts, where a treatment takes some rows at a time

        with torch.no_grad():
            actions, surprise = Squash.apply(self.actor.network(batch.next_observations), noise[0])
            values = self.critic.target(critics_see(batch.next_observations, actions)).amin(1)
            following = torch.addcmul(values, temperatures, surprise)
            following.addcmul_(following, batch.ended, value=-1)  # nothing follows an end
            targets = clipped(torch.add(batch.rewards, following, alpha=config.gamma), config.clip)

        def value_loss(rows: Tensor) -> Tensor:
            tasks = self._tasks_of(rows)
            values = clipped(self.critic.network(at(rows, batch.judged, tasks), tasks), config.clip)
            value_losses.append(F.mse_loss(values, at(rows, targets, tasks).unsqueeze(1).expand_as(values)))
            return value_losses[-1]

        def policy_loss(rows: Tensor) -> Tensor:
            tasks = self._tasks_of(rows)
            observations = at(rows, batch.observations, tasks)
            actions, surprise = Squash.apply(self.actor.network(observations, tasks), at(rows, noise[1], tasks))
            values = self.critic.network(critics_see(observations, actions), tasks)
            loss, least = PolicyLoss.apply(values, temperatures if tasks is None else temperatures[tasks], surprise)
            policy_losses.append(loss)
            judged.append((rows, least, surprise.detach()))
            return loss

        self.critic.minimise(value_loss, self._rows, self._tasks, generator)
        with frozen(self.critic.network):
            self.actor.minimise(policy_loss, self._rows, self._tasks, generator)

        values, entropies = (together(judged, kind).view_as(targets).mean(0) for kind in (1, 2))
        # of the mean over tasks of log temperature * (entropy - target): below the target a temperature rises
        self.log_temperatures.grad = torch.add(self._minus_target, entropies, alpha=1 / len(entropies))
        self.temperature_optimizer.step()

        online, target = (list(network.parameters()) for network in (self.critic.network, self.critic.target))
        with torch.no_grad():
            torch._foreach_lerp_(target, online, config.tau)
        losses = (mean_of(parts).detach().expand_as(values) for parts in (policy_losses, value_losses))
        return torch.stack((*losses, temperatures, entropies, values)).mean(1)

    def _tasks_of(self, rows: Tensor) -> Tensor | None:
        """Task ids as the networks take them; rows are counted task by task at each of the timesteps in turn."""
        return None if len(rows) == len(self._tasks) else self._tasks[rows]

    @torch.no_grad()
    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Draw an action for one observation of every task [num_tasks, ...], from normal noise [num_tasks, actions]."""
        return Squash.apply(self.actor.network(observations.unsqueeze(0)).squeeze(0), noise)[0]

    def rewire(self, clock: int) -> None:
        """Tell the treatment that `clock` timesteps have passed."""
        self.actor.rewire(clock)
        self.critic.rewire(clock)

    @property
    def compactions(self) -> int:
        """How often memory of the networks has moved."""
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


@torch.no_grad()
def best(actor: nn.Module, observations: np.ndarray) -> np.ndarray:
    """The actions of the means, for one observation of every task."""
    seen = torch.from_numpy(observations).to(next(actor.parameters()).device)
    return gaussian(actor(seen.unsqueeze(0)).squeeze(0))[0].tanh().cpu().numpy()


def critics_see(observations: Tensor, actions: Tensor) -> Tensor:
    """What critics see: [..., features + actions]."""
    return torch.cat((observations, actions), dim=-1)


def at(rows: Tensor, of_all: Tensor, tasks: Tensor | None) -> Tensor:
    """These rows of what is [M, num_tasks, ...]; without task ids all of it, as it is."""
    return of_all if tasks is None else of_all.flatten(0, 1)[rows]


def together(parts: list[tuple[Tensor, ...]], kind: int) -> Tensor:
    """What the parts hold of this kind, in the order of the rows, which are their first kind."""
    if len(parts) == 1:
        return parts[0][kind]
    order = torch.cat([part[0] for part in parts]).argsort()
    return torch.cat([part[kind] for part in parts])[order]


def clipped(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else F.hardtanh(values, -bound, bound)  # clamp's gradient takes four kernels


class PolicyLoss(torch.autograd.Function):
    """Minus the mean over rows of the lesser critic's value and of what surprise is worth; and those lesser values.

    Written out with its gradient, for fewer kernels. Values are [M, 2, num_tasks], surprise [M, num_tasks] and
    temperatures [num_tasks]; or there is no dimension of tasks, and temperatures are of rows.
    """

    @staticmethod
    def forward(ctx, values: Tensor, temperatures: Tensor, surprise: Tensor) -> tuple[Tensor, Tensor]:
        least, critic = values.min(1)
        ctx.save_for_backward(critic, temperatures)
        ctx.mark_non_differentiable(least)
        ctx.set_materialize_grads(False)
        return torch.addcmul(least, temperatures, surprise).mean().neg_(), least

    @staticmethod
    def backward(ctx, of_loss: Tensor, _: None) -> tuple[Tensor, None, Tensor]:
        critic, temperatures = ctx.saved_tensors
        of_row = of_loss * (-1 / critic.numel())
        critic = critic.unsqueeze(1)
        of_values = of_row.new_zeros((len(critic), MTSACCritics.CRITICS, *critic.shape[2:]))
        return (
            of_values.scatter_(1, critic, of_row.expand_as(critic)),
            None,
            (of_row * temperatures).expand(len(critic), *critic.shape[2:]),
        )


def mean_of(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, no gradients of the network's parameters are computed."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
