"""Trainer: what all trainings have in common. It learns, evaluates, measures, rewires, logs and saves."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from rl import checkpoint
from rl.algorithms.learner import Learner
from rl.algorithms.rows import Metrics, Row, Rows
from rl.config import Config
from rl.evaluators import Evaluators
from rl.metrics import LogProbs, fisher_trace, network_metrics
from rl.reporting.logger import Logger, timed
from rl.seeds import Stream, torch_generator


class Trainer:
    """Trains one agent in one run folder. A subclass says how its agent learns and how well it does.

    Args:
        quiet: without a progress bar.
    """

    steps: int
    """Timesteps of one call of learn."""
    learners: dict[str, Learner]
    """The networks by role, of which "actor" is one."""
    log_probs: LogProbs
    """Of the policy."""

    def __init__(self, config: Config, folder: Path, quiet: bool = False):
        torch.set_num_threads(config.threads)
        precision = config.sac.matmul_precision if config.algorithm == "sac" else "highest"
        torch.set_float32_matmul_precision(precision)  # also to what it was: a process may run one after the other
        self.config, self.folder, self.quiet = config, folder, quiet
        self.clock = 0
        """Timesteps that have passed."""
        self._waiting = ThreadPoolExecutor(1)  # the thread that waits for the evaluators

    def learn(self, steps: int) -> Metrics:
        """Learn from the timesteps that follow the clock: self.steps of them, or fewer at the end of the run."""
        raise NotImplementedError

    evaluators: Evaluators | None = None
    """Those that play evaluations while this process learns; None: it plays them, and learns afterwards."""

    def play(self, policy: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Play whole episodes of every task: undiscounted returns, and which were solved, [num_tasks, episodes]."""
        raise NotImplementedError

    def act(self, observation: np.ndarray, task: int, generator: np.random.Generator) -> np.ndarray:
        """The action that `play` takes, for one observation of this task."""
        raise NotImplementedError

    def metrics(self, returns: np.ndarray, solved: np.ndarray) -> Metrics:
        """What `play` returned as metrics; score/mean and success/mean are among them."""
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """What changes in a run and has a state_dict, by its name in the checkpoint."""
        raise NotImplementedError

    def train(self) -> None:
        """Train until the run's timesteps have passed; begin at the folder's last checkpoint, where it has one."""
        config = self.config
        csv_bytes, unevaluated = self.resume()
        progress = tqdm(total=config.timesteps, initial=self.clock, unit="timestep", disable=self.quiet or None)
        with Logger(self.folder, self.clock, csv_bytes) as logger, progress:
            rows = Rows(logger, partial(self.report, progress))
            if unevaluated:  # when the run was interrupted; so that is repeated
                self._evaluate(unevaluated)
                rows.add(unevaluated)
            while self.clock < config.timesteps:
                before = self.clock
                learned = self.learn(min(self.steps, config.timesteps - before))
                self.clock = min(before + self.steps, config.timesteps)
                row = Row(self.clock, learned)

                finished = self.clock == config.timesteps
                evaluating = finished or self.clock // config.evaluate_every > before // config.evaluate_every
                if evaluating:  # before rewiring: this is the policy that was learned
                    rows.write(wait=True)  # one evaluation at a time
                    row.policy = self.policy()
                    self._evaluate(row)
                    with timed(row.followed, "time/metrics_ms"):
                        row.followed |= self.measure()
                if not finished:  # nobody would train what a last rewire grows
                    with timed(row.followed, "time/rewire_ms"):
                        self.rewire()
                rows.add(row)
                rows.write(wait=finished)
                if evaluating:
                    self.save(logger.flush(), rows.first)
                progress.update(self.clock - before)

    def policy(self) -> nn.Module:
        """A copy of the actor as it is now, on the CPU."""
        return deepcopy(self.learners["actor"].network).cpu()

    def _evaluate(self, row: Row) -> None:
        """Evaluate the row's policy here, or begin to elsewhere."""
        self.before_evaluation()

        def evaluate(play: Callable[[nn.Module], tuple[np.ndarray, np.ndarray]]) -> Metrics:
            metrics = {}
            with timed(metrics, "time/evaluate_ms"):
                metrics |= self.metrics(*play(row.policy))
            return metrics

        if self.evaluators is None:
            row.evaluation = evaluate(self.play)
        else:
            play = partial(self.evaluators.play, seed=self.config.seed, clock=row.clock)
            row.evaluation = self._waiting.submit(evaluate, play)

    def before_evaluation(self) -> None:
        """Forget what a run that resumes at this evaluation would not know."""

    def report(self, progress: tqdm, clock: int, metrics: Metrics) -> None:
        """Show an evaluation: at the progress bar, or as a line where there is no terminal for one."""
        shown = ("success",) if self.config.suite == "mt10" else ("score", "success")  # there they are equal
        values = {name: f"{metrics[f'{name}/mean']:.3f}" for name in shown}
        values |= {"density": f"{metrics['sparse/density']:.3f}", "steps/s": f"{metrics['time/steps_per_second']:,.0f}"}
        if not progress.disable:
            progress.set_postfix(values)
        elif not self.quiet:
            words = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"{clock:,} of {self.config.timesteps:,} timesteps: {words}", flush=True)

    def measure(self) -> Metrics:
        """The plasticity metrics of all networks (rl/metrics.py)."""
        return plasticity_metrics(self.learners, self.log_probs, self.config.seed, self.clock)

    def rewire(self) -> None:
        """Tell the treatments the time."""
        for learner in self.learners.values():
            learner.rewire(self.clock)

    def resume(self) -> tuple[int, Row | None]:
        """Load the run's last checkpoint, where it has one.

        Returns:
            The length of metrics.csv in bytes at that time, and the row whose evaluation went on then, if one did.
        """
        state = checkpoint.load(self.folder)
        if state is None:
            return 0, None
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.clock = state["clock"]
        unevaluated = state.get("unevaluated")  # older checkpoints have none
        if unevaluated is None:
            return state["csv_bytes"], None
        policy = self.policy()
        policy.load_state_dict(unevaluated["policy"])
        learned, followed = unevaluated["metrics"]
        return state["csv_bytes"], Row(self.clock, learned, followed=followed, policy=policy)

    def save(self, csv_bytes: int, unevaluated: Row | None) -> None:
        """Replace the run's checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"clock": self.clock, "csv_bytes": csv_bytes, "unevaluated": unevaluated and unevaluated.state_dict()}
        checkpoint.save(self.folder, state)

    def close(self) -> None:
        """End the processes that the training began."""
        if self.evaluators:
            self.evaluators.close()
        self._waiting.shutdown()


def plasticity_metrics(learners: dict[str, Learner], log_probs: LogProbs, seed: int, clock: int) -> Metrics:
    """What the networks are like, by role, of which "actor" is one; log_probs: of its policy."""
    metrics = {}
    for role, learner in learners.items():
        generator = torch_generator(seed, Stream.METRICS, clock)  # anew: all networks see the same entries
        sample = learner.buffer.sample(generator)
        metrics |= network_metrics(role, learner.network, *sample)
        if role == "actor":
            metrics["fisher/actor"] = fisher_trace(learner.network, *sample, log_probs, generator)
    return metrics
