"""Multi-task PPO on MT10: rollouts of all tasks in lock-step, and one fit of the actor after each.

The hyper-parameters, and the linear baseline instead of a critic network, are those of metaworld-algorithms. The actor
is Gaussian; the environments' box clips its actions.
"""

import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rl.agents import AGENTS
from rl.agents.encoder import StateEncoder
from rl.baseline import LinearBaseline
from rl.buffer import PlasticityBuffer
from rl.config import Config, MT10PPOConfig
from rl.envs.metaworld import ACTIONS, MT10, OBSERVATIONS, make_mt10
from rl.envs.workers import Workers
from rl.evaluate import evaluate_mt10, judge_mt10
from rl.gaussian import entropies, gaussian, log_probs, log_probs_of_draws
from rl.learner import Learner, sizes
from rl.logger import timed
from rl.loop import loop
from rl.metrics import plasticity
from rl.ppo import explained_variance, gae, improve, normalised
from rl.rollout import episode_returns
from rl.seeds import Stream, numpy_generator, torch_generator

TASKS = torch.arange(len(MT10))


def train(config: Config, folder: Path, quiet: bool = False) -> None:
    """Train in this run folder, from its last checkpoint where it has one; quiet: without a progress bar."""
    torch.set_num_threads(config.threads)
    buffer = PlasticityBuffer(OBSERVATIONS.shape, torch.float32)
    actor = learner(config, buffer)
    with closing(make_mt10(config.seed, config.workers)) as envs:

        def learn(clock: int, steps: int) -> dict[str, float]:
            metrics: dict[str, float] = {}
            rollout = collect(envs, actor.network, steps, config.seed, clock)
            with timed(metrics, "time/update_ms"):
                metrics |= fit(actor, rollout, config.ppo_mt10, config.seed, clock)
            buffer.add(rollout.observations.flatten(0, 1), TASKS.repeat(steps))
            return metrics | describe(rollout) | sizes(actor)

        def judged(clock: int) -> dict[str, float]:
            found = evaluate_mt10(envs, partial(best, actor.network), config.episodes, config.seed, clock)
            return judge_mt10([task.name for task in MT10], *found)

        def described(clock: int) -> dict[str, float]:
            return plasticity({"actor": actor}, log_probs_of_draws, config.seed, clock)

        parts = {"actor": actor, "buffer": buffer}
        loop(config, folder, quiet, parts, config.ppo_mt10.rollout_steps, learn, judged, described, actor.rewire)


def learner(config: Config, buffer: PlasticityBuffer) -> Learner:
    """The actor, of a mean and a logarithm of a standard deviation per action."""

    def network(block_size: int) -> nn.Module:
        encoder = partial(StateEncoder, in_features=OBSERVATIONS.shape[0], block_size=block_size)
        return AGENTS[config.agent](len(MT10), 2 * ACTIONS.shape[0], block_size, encoder)

    ppo = config.ppo_mt10
    adam = {"lr": ppo.learning_rate, "eps": 1e-5}  # epsilon as in the code that the other settings are from
    return Learner(config, "actor", network, buffer, adam, ppo.max_gradient_norm)


@dataclass(frozen=True)
class Rollout:
    """T timesteps of MT10's n tasks. Row t of a [T, n] tensor is what happened to all tasks in timestep t."""

    observations: Tensor  # float32 [T, n, features]
    actions: Tensor  # float32 [T, n, actions]: as drawn; what the environment did is what its box makes of it
    log_probs: Tensor  # float32 [T, n]: of the actions, by the policy that drew them
    rewards: Tensor  # float32 [T, n]
    terminated: Tensor  # bool [T, n]: the episode ended here because of what happened, so nothing follows
    cut: Tensor  # bool [T, n]: time ran out, or the rollout ends here; what would have followed still has its value
    next_observations: Tensor  # float32 [T, n, features]: what the actions led to, be it the last of its episode
    elapsed: Tensor  # int64 [T, n]: timesteps since the episode began
    episode_returns: list[list[float]]  # per task, of the episodes that ended; undiscounted
    solved: list[list[bool]]  # of the same episodes, whether any step had its task solved
    seconds: float  # wall time of all of it
    seconds_acting: float  # the part spent in the policy


@torch.no_grad()
def collect(envs: Workers, actor: nn.Module, steps: int, seed: int, clock: int) -> Rollout:
    """Let the actor step all environments, from fresh episodes."""
    start = time.perf_counter()
    seconds_acting = 0.0
    noise = torch.randn(steps, len(MT10), *ACTIONS.shape, generator=torch_generator(seed, Stream.ROLLOUT, clock))
    observations, next_observations = np.empty((2, steps, len(MT10), *OBSERVATIONS.shape), np.float32)
    outputs = torch.empty(steps, len(MT10), 2 * ACTIONS.shape[0])
    actions = torch.empty_like(noise)
    rewards, solved = np.empty((2, steps, len(MT10)), np.float32)
    terminated, truncated = np.empty((2, steps, len(MT10)), bool)
    elapsed = np.zeros((steps + 1, len(MT10)), np.int64)
    seeds = numpy_generator(seed, Stream.RESET, clock).integers(2**31, size=len(MT10))
    current, _ = envs.reset(seed=seeds.tolist())
    for t in range(steps):
        acting = time.perf_counter()
        observations[t] = current
        outputs[t] = actor(torch.from_numpy(current), TASKS)
        mean, log_std = gaussian(outputs[t])
        actions[t] = mean + log_std.exp() * noise[t]
        clipped = actions[t].numpy().clip(ACTIONS.low, ACTIONS.high)
        seconds_acting += time.perf_counter() - acting
        current, rewards[t], terminated[t], truncated[t], infos = envs.step(clipped)
        next_observations[t], solved[t] = infos["final_obs"], infos["success"]
        elapsed[t + 1] = np.where(terminated[t] | truncated[t], 0, elapsed[t] + 1)

    cut = truncated.copy()
    cut[-1] = True
    ended = terminated | truncated
    happened = (rewards, terminated, cut & ~terminated, next_observations, elapsed[:-1])
    return Rollout(
        torch.from_numpy(observations),
        actions,
        log_probs(outputs, actions),
        *map(torch.from_numpy, happened),
        episode_returns=[episode_returns(rewards[:, i], ended[:, i]) for i in range(len(MT10))],
        solved=[[count > 0 for count in episode_returns(solved[:, i], ended[:, i])] for i in range(len(MT10))],
        seconds=time.perf_counter() - start,
        seconds_acting=seconds_acting,
    )


def fit(actor: Learner, rollout: Rollout, ppo: MT10PPOConfig, seed: int, clock: int) -> dict[str, float]:
    """Improve the actor by one rollout; returns its loss and what else says how it went."""
    advantages, metrics = judged_by_baseline(rollout, ppo)
    # from here on one row per transition, of all tasks
    observations, actions = rollout.observations.flatten(0, 1), rollout.actions.flatten(0, 1)
    tasks = TASKS.repeat(len(rollout.rewards))

    def judge_actions(rows: Tensor) -> tuple[Tensor, Tensor]:
        outputs = actor.network(observations[rows], tasks[rows])
        return log_probs(outputs, actions[rows]), entropies(outputs)

    of_rows = (rollout.log_probs.flatten(), normalised(advantages).flatten(), tasks)
    minibatch = -(-len(tasks) // ppo.minibatches)  # rounded up
    generator = torch_generator(seed, Stream.MINIBATCH, clock)
    return improve(actor, judge_actions, *of_rows, minibatch, ppo, generator) | metrics


def judged_by_baseline(rollout: Rollout, ppo: MT10PPOConfig) -> tuple[Tensor, dict[str, float]]:
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


def describe(rollout: Rollout) -> dict[str, float]:
    """How collecting went: the episodes that ended, per task that had any, and the time it took."""
    metrics = {}
    for task, returns, solved in zip(MT10, rollout.episode_returns, rollout.solved, strict=True):
        if returns:
            metrics[f"rollout/{task.name}"] = sum(returns) / len(returns)
            metrics[f"rollout_success/{task.name}"] = sum(solved) / len(solved)
    return metrics | {
        "time/steps_per_second": rollout.rewards.numel() / rollout.seconds,
        "time/acting_ms": 1e3 * rollout.seconds_acting,
    }
