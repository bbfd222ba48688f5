"""Multi-task SAC on MT10: environments step in other processes while the networks learn, one update per timestep.

The actions of a timestep are chosen before its update, so they lag the learner by exactly one update, whatever takes
longer: stepping overlaps learning, and a seed repeats its run.
"""

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from rl.config import Config
from rl.envs.metaworld import MT10, STEPS, make_mt10
from rl.envs.workers import Workers
from rl.evaluate import evaluate_mt10, judge_mt10
from rl.gaussian import log_probs_of_draws
from rl.learner import sizes
from rl.loop import loop
from rl.metrics import plasticity
from rl.replay import Replay
from rl.sac import SAC, STATS
from rl.seeds import Stream, numpy_generator, torch_generator


def train(config: Config, folder: Path, quiet: bool = False) -> None:
    """Train in this run folder, from its last checkpoint where it has one; quiet: without a progress bar."""
    torch.set_num_threads(config.threads)
    device = config.sac.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with closing(make_mt10(config.seed, config.workers)) as envs:
        features, actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        replay = Replay(config.sac.capacity, len(MT10), features, actions, device)
        agent = SAC(config, replay, len(MT10), features, actions, device)
        observations = None  # what the environments show; None: they must be reset

        def learn(clock: int, steps: int) -> dict[str, float]:
            nonlocal observations
            if observations is None:  # a run starts or resumes, or an evaluation is over
                seeds = numpy_generator(config.seed, Stream.RESET, clock).integers(2**31, size=len(MT10))
                observations, _ = envs.reset(seed=seeds.tolist())
            observations, metrics = episode(config, envs, agent, replay, observations, clock, steps)
            return metrics | sizes(agent.actor, agent.critic)

        def judged(clock: int) -> dict[str, float]:
            nonlocal observations
            observations = None
            found = evaluate_mt10(envs, agent.best, config.episodes, config.seed, clock)
            return judge_mt10([task.name for task in MT10], *found)

        def described(clock: int) -> dict[str, float]:
            return plasticity({"actor": agent.actor, "critic": agent.critic}, log_probs_of_draws, config.seed, clock)

        parts = {"agent": agent, "replay": replay}
        loop(config, folder, quiet, parts, STEPS, learn, judged, described, agent.rewire)


def episode(
    config: Config, envs: Workers, agent: SAC, replay: Replay, observations: np.ndarray, clock: int, steps: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Step all environments through an episode and learn meanwhile; returns what they show then, and how it went."""
    start = time.perf_counter()
    acting = torch_generator(config.seed, Stream.ROLLOUT, clock)
    learning = torch_generator(config.seed, Stream.MINIBATCH, clock, agent.device)
    seconds = dict.fromkeys(("acting", "update", "waiting"), 0.0)
    returns, solved = np.zeros(len(MT10)), np.zeros(len(MT10), bool)
    stats, updates = torch.zeros(len(STATS), device=agent.device), 0
    for now in range(clock, clock + steps):
        warm = now >= config.sac.warmup
        begun = time.perf_counter()
        seen = torch.from_numpy(observations).to(agent.device)
        noise = torch.randn(len(MT10), agent.actions, generator=acting)
        uniform = torch.rand(len(MT10), agent.actions, generator=acting) * 2 - 1
        actions = agent.act(seen, noise.to(agent.device)) if warm else uniform.to(agent.device)
        envs.step_async(actions.cpu().numpy())
        acted = time.perf_counter()
        if warm:
            stats += agent.update(learning)
            updates += 1
            if agent.device == "cuda":  # the next actions wait for it anyway; so its time does not count as theirs
                torch.cuda.synchronize()
        updated = time.perf_counter()
        observations, rewards, terminated, truncated, infos = envs.step_wait()
        waited = time.perf_counter()
        ended = terminated | truncated if config.sac.time_out_ends else terminated
        happened = (np.float32(rewards), infos["final_obs"], np.float32(ended))
        replay.add(seen, actions, *(torch.from_numpy(array).to(agent.device) for array in happened))
        returns += rewards
        solved |= infos["success"] > 0
        for name, passed in zip(seconds, np.diff((begun, acted, updated, waited)), strict=True):
            seconds[name] += passed
    metrics = dict(zip(STATS, (stats / updates).tolist(), strict=True)) if updates else {}
    for i, task in enumerate(MT10):
        metrics |= {f"rollout/{task.name}": returns[i], f"rollout_success/{task.name}": solved[i]}
    metrics |= {f"time/{name}_ms": 1e3 * seconds[name] / steps for name in seconds}
    return observations, metrics | {"time/steps_per_second": steps * len(MT10) / (time.perf_counter() - start)}
