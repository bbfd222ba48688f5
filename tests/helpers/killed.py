"""Jobs for rl/test_sweep.py in place of trainings, in a module that a fresh process imports at once."""

import os
import signal
import time
from pathlib import Path


def killed_of_seed_1(job):
    config, _ = job
    if config.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return finished(config), ""


def met_by_both_seeds(job):
    """Ends when the runs of seeds 1 and 2 are at work at the same time; notes the node of the cluster."""
    import ray

    config, _ = job
    folder = finished(config)
    (folder / "node.txt").write_text(ray.get_runtime_context().get_node_id())
    deadline = time.monotonic() + 60
    while not all((config.runs / seed / "node.txt").exists() for seed in "12"):
        if time.monotonic() > deadline:
            return folder, "the other run has not begun"
        time.sleep(0.1)
    return folder, ""


def finished(config) -> Path:
    """The folder of a run that has come to its end."""
    folder = config.runs / str(config.seed)
    folder.mkdir(parents=True)
    config.save(folder)
    (folder / "environment.txt").write_text("")
    (folder / "metrics.csv").write_text(f"step,name,value\n{config.timesteps},score/mean,0.5\n")
    return folder
