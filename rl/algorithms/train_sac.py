"""Multi-task SAC on MT10: environments step in other processes while the networks learn, one update per timestep.

The actions of a timestep are chosen before its update, so they lag the learner by exactly one update, whatever takes
longer: stepping overlaps learning, and a seed repeats its run.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.algorithms.gaussian import log_probs_of_draws
from rl.algorithms.learner import sizes
from rl.algorithms.replay import Replay
from rl.algorithms.sac import SAC, STATS, best
from rl.algorithms.timestep import Timestep
from rl.algorithms.trainer import Metrics
from rl.algorithms.trainer_mt10 import MT10Trainer
from rl.config import Config
from rl.envs.metaworld import ACTIONS, MT10, OBSERVATIONS, STEPS
from rl.envs.workers import Workers
from rl.seeds import Stream, numpy_generator, torch_generator


class SACTrainer(MT10Trainer):
    def __init__(self, config: Config, folder: Path, quiet: bool = False):
        super().__init__(config, folder, quiet)
        device = config.sac.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        features, actions = OBSERVATIONS.shape[0], ACTIONS.shape[0]
        self.steps = STEPS
        self.replay = Replay(config.sac.capacity, len(MT10), features, actions, device)
        self.agent = SAC(config, self.replay, len(MT10), features, actions, device)
        self.timestep = Timestep(self.agent)
        self.learners = {"actor": self.agent.actor, "critic": self.agent.critic}
        self.log_probs = log_probs_of_draws
        self.observations = None  # what the environments show; None: they must be reset
        self.start_processes(best)

    def learn(self, steps: int) -> Metrics:
        config = self.config
        if self.observations is None:  # a run starts or resumes, or an evaluation is over
            seeds = numpy_generator(config.seed, Stream.RESET, self.clock).integers(2**31, size=len(MT10))
            self.observations, _ = self.envs.reset(seed=seeds.tolist())
        self.observations, metrics = episode(config, self.envs, self.timestep, self.observations, self.clock, steps)
        return metrics | sizes(*self.learners.values())

    def before_evaluation(self) -> None:
        self.observations = None

    def rewire(self) -> None:
        self.agent.rewire(self.clock)

    def parts(self) -> dict[str, Any]:
        return {"agent": self.agent, "replay": self.replay}


def episode(
    config: Config, envs: Workers, timestep: Timestep, observations: np.ndarray, clock: int, steps: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Step all environments through an episode and learn meanwhile; returns what they show then, and how it went."""
    began = time.perf_counter()
    acting, learning = (torch_generator(config.seed, of, clock) for of in (Stream.ROLLOUT, Stream.MINIBATCH))
    seconds = dict.fromkeys(("acting", "update", "waiting"), 0.0)
    returns, solved = np.zeros(len(MT10)), np.zeros(len(MT10), bool)
    first = min(max(clock, config.sac.warmup), clock + steps)  # timestep of an update; before, any actions are taken
    for now in range(clock, clock + steps):
        warm = now >= first
        if now == first:
            timestep.begin(learning)
        times, seen = [time.perf_counter()], observations
        noise = torch.randn(len(MT10), ACTIONS.shape[0], generator=acting)
        actions = torch.rand(noise.shape, generator=acting) * 2 - 1
        envs.step_async(timestep.start(seen, noise) if warm else actions.numpy())
        times.append(time.perf_counter())
        if warm:  # what is left of the update is waited for in any case, so it does not count as acting
            timestep.finish()
        times.append(time.perf_counter())
        observations, rewards, terminated, truncated, infos = envs.step_wait()
        times.append(time.perf_counter())
        ended = terminated | truncated if config.sac.time_out_ends else terminated
        outcome = rewards, infos["final_obs"], ended
        if warm:
            timestep.arrive(*outcome)
        else:
            timestep.replay.add(*map(torch.as_tensor, (seen, actions, *outcome)))
        returns += rewards
        solved |= infos["success"] > 0
        for name, passed in zip(seconds, np.diff(times), strict=True):
            seconds[name] += passed
    metrics, updates = {}, clock + steps - first
    if updates:
        timestep.end()
        metrics |= zip(STATS, (timestep.stats / updates).tolist(), strict=True)
    for i, task in enumerate(MT10):
        metrics |= {f"rollout/{task.name}": returns[i], f"rollout_success/{task.name}": solved[i]}
    metrics |= {f"time/{name}_ms": 1e3 * seconds[name] / steps for name in seconds}
    return observations, metrics | {"time/steps_per_second": steps * len(MT10) / (time.perf_counter() - began)}
