"""The loop that all agents train in: learn, evaluate, rewire, log and save, until the run's timesteps have passed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rl import checkpoint
from rl.config import Config
from rl.logger import Logger, timed

Metrics = dict[str, float]


def loop(
    config: Config,
    folder: Path,
    quiet: bool,
    parts: Mapping[str, Any],
    steps: int,
    learn: Callable[[int, int], Metrics],
    evaluate: Callable[[int], Metrics],
    describe: Callable[[int], Metrics],
    rewire: Callable[[int], None],
) -> None:
    """Train in this run folder, from its last checkpoint where it has one.

    Args:
        quiet: without a progress bar.
        parts: what changes in a run and has a state_dict, by its name in the checkpoint.
        steps: timesteps of one call of learn.
        learn(clock, steps): learn from the timesteps that follow `clock`; fewer than `steps` at the end of the run.
        evaluate(clock): how well the policy does; score/mean and success/mean among others.
        describe(clock): what the networks are like.
        rewire(clock): tell the treatments the time.
    """
    state = checkpoint.load(folder) or {"clock": 0, "csv_bytes": 0}
    if state["clock"]:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    clock = state["clock"]
    progress = tqdm(total=config.timesteps, initial=clock, unit="timestep", disable=quiet or None)
    with Logger(folder, clock, state["csv_bytes"]) as logger, progress:
        while clock < config.timesteps:
            now = min(steps, config.timesteps - clock)
            metrics = learn(clock, now)
            evaluating = (clock + now) // config.evaluate_every > clock // config.evaluate_every
            clock += now
            finished = clock == config.timesteps
            if evaluating or finished:  # before rewiring: this is the policy that was learned
                with timed(metrics, "time/evaluate_ms"):
                    metrics |= evaluate(clock)
                with timed(metrics, "time/metrics_ms"):
                    metrics |= describe(clock)
                progress.set_postfix(score=metrics["score/mean"], success=metrics["success/mean"])
            if not finished:  # nobody would train what a last rewire grows
                with timed(metrics, "time/rewire_ms"):
                    rewire(clock)
            logger.record(clock, metrics)
            if evaluating or finished:
                whole = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save(folder, {"clock": clock, "csv_bytes": logger.flush(), **whole})
            progress.update(now)
