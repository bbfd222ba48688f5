"""Multi-task PPO: rollouts of all tasks in lock-step, one fit after each, evaluations and checkpoints between fits."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rl import checkpoint
from rl.agents import AGENTS
from rl.buffer import PlasticityBuffer
from rl.config import Config, PPOConfig
from rl.envs import SUITES
from rl.envs.minigrid import Task
from rl.envs.pool import EnvPool
from rl.evaluate import evaluate, judge
from rl.learner import Learner, sizes
from rl.logger import Logger, timed
from rl.metrics import plasticity
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
    parts = {"actor": actor, "critic": critic, "buffer": buffer}
    state = checkpoint.load(folder) or {"clock": 0, "csv_bytes": 0}
    if state["clock"]:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    clock = state["clock"]
    progress = tqdm(total=config.timesteps, initial=clock, unit="timestep", disable=quiet or None)
    with Logger(folder, clock, state["csv_bytes"]) as logger, progress:
        while clock < config.timesteps:
            steps = min(config.ppo.rollout_steps, config.timesteps - clock)
            metrics: dict[str, float] = {}
            rollout = collect(pool, actor.network, len(tasks), steps, config.seed, clock)
            with timed(metrics, "time/update_ms"):
                metrics |= fit(actor, critic, rollout, config.ppo, config.seed, clock)
            metrics |= describe(tasks, rollout) | sizes(actor, critic)
            buffer.add(rollout.observations[rollout.seen.flatten()], rollout.tasks[rollout.seen.flatten()])

            evaluating = (clock + steps) // config.evaluate_every > clock // config.evaluate_every
            clock += steps
            finished = clock == config.timesteps
            if evaluating or finished:  # before rewiring: this is the policy that the fit made
                with timed(metrics, "time/evaluate_ms"):
                    returns = evaluate(pool, actor.network, len(tasks), config.episodes, config.seed, clock)
                metrics |= judge(tasks, returns)
                with timed(metrics, "time/metrics_ms"):
                    metrics |= plasticity(actor.network, critic.network, buffer, config.seed, clock)
                progress.set_postfix(score=metrics["score/mean"], success=metrics["success/mean"])
            if not finished:  # nobody would train what a last rewire grows
                with timed(metrics, "time/rewire_ms"):
                    actor.rewire(clock)
                    critic.rewire(clock)
            logger.record(clock, metrics)
            if evaluating or finished:
                whole = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save(folder, {"clock": clock, "csv_bytes": logger.flush(), **whole})
            progress.update(steps)


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

    # each task's advantages by its own spread: rewards differ in scale between tasks
    advantages = (advantages - advantages.mean(0)) / (advantages.std(0, correction=0) + 1e-8)
    log_probs = rollout.logits.log_softmax(-1)[seen, rollout.actions]
    # from here on one row per transition, of all tasks; what was seen several times goes through a network once
    seen, actions, log_probs, advantages, targets = (
        t.flatten() for t in (seen, rollout.actions, log_probs, advantages, targets)
    )
    tasks = rollout.tasks[seen]
    generator = torch_generator(seed, Stream.MINIBATCH, clock)
    value_losses, history = [], []

    def answers(network: nn.Module, rows: Tensor) -> Tensor:
        distinct, which = seen[rows].unique(return_inverse=True)
        return network(rollout.observations[distinct], rollout.tasks[distinct])[which]

    def value_loss(rows: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(answers(critic.network, rows).squeeze(-1), targets[rows])
        value_losses.append(loss.detach())
        return loss

    def surrogate_loss(rows: Tensor) -> Tensor:
        logits = answers(actor.network, rows)
        loss, stats = policy_loss(logits, actions[rows], log_probs[rows], advantages[rows], ppo.clip, ppo.entropy)
        history.append(stats)
        return loss

    # the paper's critic takes one step on everything; that of its single-task reference takes minibatches
    for batch in minibatches(len(seen), ppo.minibatch if num_tasks == 1 else len(seen), generator):
        critic.minimise(value_loss, batch, tasks[batch], generator)
    for _ in range(ppo.epochs):
        for batch in minibatches(len(seen), ppo.minibatch * num_tasks, generator):
            actor.minimise(surrogate_loss, batch, tasks[batch], generator)
    names = ("loss/policy", "ppo/entropy", "ppo/approx_kl", "ppo/clip_fraction")
    return dict(zip(names, torch.stack(history).mean(0).tolist(), strict=True)) | {
        "loss/value": torch.stack(value_losses).mean().item(),
        "ppo/explained_variance": 1 - ((targets - values.flatten()).var() / targets.var()).item(),
    }


def minibatches(rows: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """All rows in random order, in parts of this size; the last may be smaller."""
    return torch.randperm(rows, generator=generator).split(size)


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, cut: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates [T, n].

    Args:
        rewards, values, next_values: float [T, n]; next_values[t] is the value of what followed timestep t.
        terminated: bool [T, n]: nothing followed, so next_values is not used.
        cut: bool [T, n]: the episode went on unseen; next_values is used, but no later timestep.
    """
    errors = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    decay = gamma * lam * ~(terminated | cut)
    advantages = torch.empty_like(errors)
    following = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = torch.addcmul(errors[t], decay[t], following, out=advantages[t])
    return advantages


def policy_loss(
    logits: Tensor, actions: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float, entropy: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate minus the entropy bonus, over N transitions.

    Returns:
        The loss, and detached [4]: loss, entropy in nats, approximate KL(old, new) in nats, share of clipped ratios.
    """
    log_probs = logits.log_softmax(-1)
    log_ratio = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - old_log_probs
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    mean_entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = -surrogate - entropy * mean_entropy
    clipped = ((ratio - 1).abs() > clip).float().mean()
    return loss, torch.stack((loss, mean_entropy, (ratio - 1 - log_ratio).mean(), clipped)).detach()


def describe(tasks: Sequence[Task], rollout: Rollout) -> dict[str, float]:
    """How collecting went: the mean return of the episodes that ended, per task that had any, and the time it took."""
    ended = zip(tasks, rollout.episode_returns, strict=True)
    return {f"rollout/{task.name}": sum(returns) / len(returns) for task, returns in ended if returns} | {
        "time/steps_per_second": rollout.rewards.numel() / rollout.seconds,
        "time/acting_ms": 1e3 * rollout.seconds_acting,
    }
