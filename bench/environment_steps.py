"""Environment steps per second of MT10 against worker processes, no learner: `python -m bench.environment_steps`.

The same environments stepped in this process and by workers take turns, and the ratio is taken within every round, so
that what else the machine does slows both. Beside it what is required, 0.8 * 10 / ceil(10 / workers), and the load.
"""

import math
import os
import statistics
import sys
from functools import partial

import numpy as np

from bench.measure import timed
from rl.envs.metaworld import MT10, make_mt10

STEPS = 500  # of each environment in a turn: an episode with its resets; short turns would measure idle cores wake up
ROUNDS = 5


def alone(envs: list, actions: np.ndarray) -> None:
    """Step the environments as a worker does, without one."""
    for step in actions:
        for env, action in zip(envs, step, strict=True):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()


def together(envs, actions: np.ndarray) -> None:
    for step in actions:
        envs.step(step)


def measure(num_workers: int, seed: int = 0) -> dict[str, float]:
    """Steps per second of both, medians, and the ratio with its quartiles."""
    here = [task(seed) for task in MT10]
    there = make_mt10(seed, num_workers)
    for env in here:
        env.reset(seed=seed)
    there.reset(seed=seed)
    generator = np.random.default_rng(seed)
    times = []
    for _ in range(ROUNDS):
        actions = generator.uniform(-1, 1, (STEPS, len(MT10), 4)).astype(np.float32)
        times.append([timed(partial(*call, actions)) for call in ((alone, here), (together, there))])
    there.close()
    ours, theirs = (statistics.median(len(MT10) * STEPS / t[which] for t in times) for which in (1, 0))
    low, ratio, high = statistics.quantiles([of_one / of_all for of_one, of_all in times], n=4)
    return {"steps_per_second": ours, "alone": theirs, "ratio": ratio, "ratio_q1": low, "ratio_q3": high}


def main(workers: list[int]) -> None:
    print("| workers | steps/s | one process alone | ratio (quartiles) | required | load |")
    print("| --: | --: | --: | --: | --: | --: |")
    for count in workers:
        found = measure(count)
        required = 0.8 * len(MT10) / math.ceil(len(MT10) / count)
        print(
            f"| {count} | {found['steps_per_second']:.0f} | {found['alone']:.0f}"
            f" | {found['ratio']:.2f} ({found['ratio_q1']:.2f}-{found['ratio_q3']:.2f}) | {required:.2f}"
            f" | {os.getloadavg()[0]:.1f} of {os.cpu_count()} |",
            flush=True,
        )


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]] or [count for count in (1, 2, 4, 5, 10) if count <= os.cpu_count()])
