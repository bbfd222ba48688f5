"""Multi-task PPO on MT10: rollouts of all tasks in lock-step, and one fit of the actor after each.

The hyper-parameters, and the linear baseline instead of a critic network, are those of metaworld-algorithms. The actor
is Gaussian; the environments' box clips its actions. Three things are different there: advantages are not normalised,
a time-out ends all rewards, and the features that heads read do not pass through Tanh.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.agents import AGENTS
from rl.agents.encoder import StateEncoder
from rl.algorithms.baseline import LinearBaseline
from rl.algorithms.buffer import PlasticityBuffer
from rl.algorithms.gaussian import entropies, gaussian, log_probs, log_probs_of_draws
from rl.algorithms.learner import Learner, sizes
from rl.algorithms.ppo import explained_variance, gae, improve, normalised
from rl.algorithms.rollout import TASKS, MT10Rollout, collect_mt10
from rl.algorithms.trainer import Metrics
from rl.algorithms.trainer_mt10 import MT10Trainer
from rl.config import Config, MT10PPOConfig
from rl.envs.metaworld import ACTIONS, MT10, OBSERVATIONS
from rl.reporting.logger import timed
from rl.seeds import Stream, torch_generator


class MT10PPOTrainer(MT10Trainer):
    def __init__(self, config: Config, folder: Path, quiet: bool = False):
        super().__init__(config, folder, quiet)
        self.steps = config.ppo_mt10.rollout_steps
        self.buffer = PlasticityBuffer(OBSERVATIONS.shape, torch.float32)
        self.actor = make_learner(config, self.buffer)
        self.learners = {"actor": self.actor}
        self.log_probs = log_probs_of_draws
        self.start_processes(best)

    def learn(self, steps: int) -> Metrics:
        config, metrics = self.config, {}
        rollout = collect_mt10(self.envs, self.actor.network, steps, config.seed, self.clock)
        with timed(metrics, "time/update_ms"):
            metrics |= fit(self.actor, rollout, config.ppo_mt10, config.seed, self.clock)
        self.buffer.add(rollout.observations.flatten(0, 1), TASKS.repeat(steps))
        return metrics | rollout.metrics([task.name for task in MT10]) | sizes(self.actor)

    def parts(self) -> dict[str, Any]:
        return {**self.learners, "buffer": self.buffer}


def make_learner(config: Config, buffer: PlasticityBuffer) -> Learner:
    """The actor, of a mean and a logarithm of a standard deviation per action."""

    def network(block_size: int) -> nn.Module:
        encoder = partial(StateEncoder, in_features=OBSERVATIONS.shape[0], block_size=block_size)
        return AGENTS[config.agent](len(MT10), 2 * ACTIONS.shape[0], block_size, encoder)

    ppo = config.ppo_mt10
    adam = {"lr": ppo.learning_rate, "eps": 1e-5}  # epsilon as in the code that the other settings are from
    return Learner(config, "actor", network, buffer, adam, ppo.max_gradient_norm)


def fit(actor: Learner, rollout: MT10Rollout, ppo: MT10PPOConfig, seed: int, clock: int) -> dict[str, float]:
    """Improve the actor by one rollout; returns its loss and what else says how it went."""
    advantages, metrics = baseline_advantages(rollout, ppo)
    # from here on one row per transition, of all tasks
    observations, actions = rollout.observations.flatten(0, 1), rollout.actions.flatten(0, 1)
    tasks = TASKS.repeat(len(rollout.rewards))

    def evaluate_actions(rows: Tensor) -> tuple[Tensor, Tensor]:
        outputs = actor.network(observations[rows], tasks[rows])
        return log_probs(outputs, actions[rows]), entropies(outputs)

    of_rows = (rollout.log_probs.flatten(), normalised(advantages).flatten(), tasks)
    minibatch = -(-len(tasks) // ppo.minibatches)  # rounded up
    generator = torch_generator(seed, Stream.MINIBATCH, clock)
    return improve(actor, evaluate_actions, *of_rows, minibatch, ppo, generator) | metrics


def baseline_advantages(rollout: MT10Rollout, ppo: MT10PPOConfig) -> tuple[Tensor, dict[str, float]]:
    """Advantages [T, n] over a baseline that is fitted to the rollout's own returns, and how well it fits them."""
    ends = rollout.terminated, rollout.cut
    nothing = torch.zeros_like(rollout.rewards)
    # without values, and without decay but the discount, an advantage is the return; up to a cut, for the baseline
    # knows the time, and what an episode can still earn depends on it
    returns = gae(rollout.rewards, nothing, nothing, *ends, ppo.gamma, lam=1.0)
    baseline = LinearBaseline(rollout.observations, rollout.elapsed, returns)
    values = baseline(rollout.observations, rollout.elapsed, TASKS)
    next_values = values.roll(-1, dims=0)
    cut_tasks = TASKS.expand_as(rollout.cut)[rollout.cut]
    next_values[rollout.cut] = baseline(
        rollout.next_observations[rollout.cut], rollout.elapsed[rollout.cut] + 1, cut_tasks
    )
    advantages = gae(rollout.rewards, values, next_values, *ends, ppo.gamma, ppo.gae_lambda)
    return advantages, {
        "loss/value": nn.functional.mse_loss(values, returns).item(),
        "ppo/explained_variance": explained_variance(values, returns),
    }


@torch.no_grad()
def best(actor: nn.Module, observations: np.ndarray) -> np.ndarray:
    """The means as actions, for one observation of every task."""
    mean, _ = gaussian(actor(torch.from_numpy(observations), TASKS))
    return mean.numpy().clip(ACTIONS.low, ACTIONS.high)
