"""A job for rl/test_sweep.py, in a module that a fresh process imports at once."""

import os
import signal


def killed_of_seed_1(job):
    """In place of a training."""
    config, _ = job
    if config.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    folder = config.runs / str(config.seed)
    folder.mkdir(parents=True)
    config.save(folder)
    (folder / "environment.txt").write_text("")
    (folder / "metrics.csv").write_text(f"step,name,value\n{config.timesteps},score/mean,0.5\n")
    return folder, ""
