"""Multi-task PPO on MiniGrid: rollouts of all tasks in lock-step, and one fit of actor and critic after each."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.agents import AGENTS
from rl.agents.policy import Policy
from rl.algorithms.buffer import PlasticityBuffer
from rl.algorithms.learner import Learner, sizes
from rl.algorithms.ppo import explained_variance, gae, improve, minibatches, normalised
from rl.algorithms.rollout import MiniGridRollout, collect_minigrid
from rl.algorithms.trainer import Metrics, Trainer
from rl.config import Config, PPOConfig
from rl.envs import SUITES
from rl.envs.pool import EnvPool
from rl.episodes import evaluate_minigrid, minigrid_metrics
from rl.metrics import categorical
from rl.reporting.logger import timed
from rl.seeds import Stream, torch_generator


class PPOTrainer(Trainer):
    def __init__(self, config: Config, folder: Path, quiet: bool = False):
        super().__init__(config, folder, quiet)
        self.tasks = SUITES[config.suite]
        self.steps = config.ppo.rollout_steps
        # evaluation and rollouts share environments: both begin with fresh episodes, so neither disturbs the other
        self.pool = EnvPool(self.tasks * config.episodes)
        self.buffer = PlasticityBuffer()
        self.actor = make_learner(config, "actor", int(self.pool.action_space.n), self.buffer)
        self.critic = make_learner(config, "critic", 1, self.buffer)
        self.learners = {"actor": self.actor, "critic": self.critic}
        self.log_probs = categorical

    def learn(self, steps: int) -> Metrics:
        config, metrics = self.config, {}
        rollout = collect_minigrid(self.pool, self.actor.network, len(self.tasks), steps, config.seed, self.clock)
        with timed(metrics, "time/update_ms"):
            metrics |= fit(self.actor, self.critic, rollout, config.ppo, config.seed, self.clock)
        seen = rollout.seen.flatten()
        self.buffer.add(rollout.observations[seen], rollout.tasks[seen])
        return metrics | rollout.metrics([task.name for task in self.tasks]) | sizes(self.actor, self.critic)

    def play(self, policy: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        config, num_tasks = self.config, len(self.tasks)
        returns = evaluate_minigrid(self.pool, policy, num_tasks, config.episodes, config.seed, self.clock)
        return returns, np.array([[task.solved(r) for r in row] for task, row in zip(self.tasks, returns, strict=True)])

    def act(self, observation: np.ndarray, task: int, generator: np.random.Generator) -> np.ndarray:
        policy = Policy(self.actor.network)
        return policy.act(policy.rows(observation[None], [task]), generator)[0]

    def metrics(self, returns: np.ndarray, solved: np.ndarray) -> Metrics:
        return minigrid_metrics(self.tasks, returns, solved)

    def parts(self) -> dict[str, Any]:
        return {**self.learners, "buffer": self.buffer}


def make_learner(config: Config, role: str, out_features: int, buffer: PlasticityBuffer) -> Learner:
    """Actor or critic, of so many outputs per observation."""
    make_network = partial(AGENTS[config.agent], len(SUITES[config.suite]), out_features)
    return Learner(config, role, make_network, buffer, {"lr": config.ppo.learning_rate})


def fit(
    actor: Learner, critic: Learner, rollout: MiniGridRollout, ppo: PPOConfig, seed: int, clock: int
) -> dict[str, float]:
    """Improve critic and actor by one rollout; returns their losses and what else says how it went."""
    seen, cut = rollout.seen, rollout.cut
    num_tasks = seen.shape[1]
    with torch.no_grad():
        values = critic.network(rollout.observations, rollout.tasks).squeeze(-1)[seen]
        next_values = values.roll(-1, dims=0)
        cut_tasks = torch.arange(num_tasks).expand_as(cut)[cut]
        next_values[cut] = critic.network(rollout.next_observations[cut], cut_tasks).squeeze(-1)
    advantages = gae(rollout.rewards, values, next_values, rollout.terminated, cut, ppo.gamma, ppo.gae_lambda)
    targets = values + advantages
    metrics = {"ppo/explained_variance": explained_variance(values.flatten(), targets.flatten())}

    log_probs = rollout.logits.log_softmax(-1)[seen, rollout.actions]
    # from here on one row per transition, of all tasks; what was seen several times goes through a network once
    seen, actions, log_probs, advantages, targets = (
        t.flatten() for t in (seen, rollout.actions, log_probs, normalised(advantages), targets)
    )
    tasks = rollout.tasks[seen]
    generator = torch_generator(seed, Stream.MINIBATCH, clock)
    value_losses = []

    def answers(network: nn.Module, rows: Tensor) -> Tensor:
        distinct, which = seen[rows].unique(return_inverse=True)
        return network(rollout.observations[distinct], rollout.tasks[distinct])[which]

    def value_loss(rows: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(answers(critic.network, rows).squeeze(-1), targets[rows])
        value_losses.append(loss.detach())
        return loss

    def evaluate_actions(rows: Tensor) -> tuple[Tensor, Tensor]:
        return chosen(answers(actor.network, rows), actions[rows])

    # the paper's critic takes one step on everything; that of its single-task reference takes minibatches
    for batch in minibatches(len(seen), ppo.minibatch if num_tasks == 1 else len(seen), generator):
        critic.minimise(value_loss, batch, tasks[batch], generator)
    minibatch = ppo.minibatch * num_tasks
    improved = improve(actor, evaluate_actions, log_probs, advantages, tasks, minibatch, ppo, generator)
    return improved | {"loss/value": torch.stack(value_losses).mean().item()} | metrics


def chosen(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of these actions, int64 [N], and entropies [N] in nats, of softmax(logits) [N, actions]."""
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)
