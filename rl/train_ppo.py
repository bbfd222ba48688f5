"""Multi-task PPO on MiniGrid: rollouts of all tasks in lock-step, and one fit of actor and critic after each."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rl.agents import AGENTS
from rl.buffer import PlasticityBuffer
from rl.config import Config, PPOConfig
from rl.envs import SUITES
from rl.envs.minigrid import Task
from rl.envs.pool import EnvPool
from rl.evaluate import evaluate, judge
from rl.learner import Learner, sizes
from rl.logger import timed
from rl.loop import loop
from rl.metrics import categorical, plasticity
from rl.ppo import explained_variance, gae, improve, minibatches, normalised
from rl.rollout import Rollout, collect
from rl.seeds import Stream, torch_generator


def train(config: Config, folder: Path, quiet: bool = False) -> None:
    """Train in this run folder, from its last checkpoint where it has one; quiet: without a progress bar."""
    torch.set_num_threads(config.threads)
    tasks = SUITES[config.suite]
    # rollouts share the evaluation's first environments: both begin with fresh episodes, so neither disturbs the other
    pool = EnvPool(tasks * config.episodes)
    buffer = PlasticityBuffer()
    actor = learner(config, "actor", int(pool.action_space.n), buffer)
    critic = learner(config, "critic", 1, buffer)

    def learn(clock: int, steps: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        rollout = collect(pool, actor.network, len(tasks), steps, config.seed, clock)
        with timed(metrics, "time/update_ms"):
            metrics |= fit(actor, critic, rollout, config.ppo, config.seed, clock)
        buffer.add(rollout.observations[rollout.seen.flatten()], rollout.tasks[rollout.seen.flatten()])
        return metrics | describe(tasks, rollout) | sizes(actor, critic)

    def judged(clock: int) -> dict[str, float]:
        return judge(tasks, evaluate(pool, actor.network, len(tasks), config.episodes, config.seed, clock))

    def described(clock: int) -> dict[str, float]:
        return plasticity({"actor": actor, "critic": critic}, categorical, config.seed, clock)

    def rewire(clock: int) -> None:
        actor.rewire(clock)
        critic.rewire(clock)

    parts = {"actor": actor, "critic": critic, "buffer": buffer}
    loop(config, folder, quiet, parts, config.ppo.rollout_steps, learn, judged, described, rewire)


def learner(config: Config, role: str, out_features: int, buffer: PlasticityBuffer) -> Learner:
    """Actor or critic, of so many outputs per observation."""
    make_network = partial(AGENTS[config.agent], len(SUITES[config.suite]), out_features)
    return Learner(config, role, make_network, buffer, {"lr": config.ppo.learning_rate})


def fit(actor: Learner, critic: Learner, rollout: Rollout, ppo: PPOConfig, seed: int, clock: int) -> dict[str, float]:
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

    def judge_actions(rows: Tensor) -> tuple[Tensor, Tensor]:
        return chosen(answers(actor.network, rows), actions[rows])

    # the paper's critic takes one step on everything; that of its single-task reference takes minibatches
    for batch in minibatches(len(seen), ppo.minibatch if num_tasks == 1 else len(seen), generator):
        critic.minimise(value_loss, batch, tasks[batch], generator)
    minibatch = ppo.minibatch * num_tasks
    improved = improve(actor, judge_actions, log_probs, advantages, tasks, minibatch, ppo, generator)
    return improved | {"loss/value": torch.stack(value_losses).mean().item()} | metrics


def chosen(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of these actions, int64 [N], and entropies [N] in nats, of softmax(logits) [N, actions]."""
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def describe(tasks: Sequence[Task], rollout: Rollout) -> dict[str, float]:
    """How collecting went: the mean return of the episodes that ended, per task that had any, and the time it took."""
    ended = zip(tasks, rollout.episode_returns, strict=True)
    return {f"rollout/{task.name}": sum(returns) / len(returns) for task, returns in ended if returns} | {
        "time/steps_per_second": rollout.rewards.numel() / rollout.seconds,
        "time/acting_ms": 1e3 * rollout.seconds_acting,
    }
