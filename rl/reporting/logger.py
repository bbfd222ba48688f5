"""Logger: one record call, two sinks: metrics.csv in long form (step,name,value) and TensorBoard.

The names, each with the timestep at which its value was taken:
    return/<task>, score/<task>, success/<task>   evaluation: mean undiscounted return; the same as a share of an
                                                  optimal episode's; share of episodes solved. .../mean is over tasks
    rollout/<task>, rollout_success/<task>        of the episodes that ended while collecting: mean return; on MT10,
                                                  share in which the task was solved at any step
    loss/policy, loss/value                       of the fit, averaged over minibatches; of a baseline, squared error
    ppo/entropy, ppo/approx_kl [nats], ppo/clip_fraction, ppo/explained_variance (by the critic before its step)
    sparse/live_parameters, sparse/bytes           of all networks; bytes of weights, gradients, Adam and index
    sparse/dense_parameters, sparse/dense_bytes   of the dense networks; sparse/density is live / dense parameters
    dormant/..., rank/..., fisher/...              evaluation: plasticity, as rl/metrics.py says
    time/steps_per_second (of environments, with acting), time/acting_ms, time/update_ms, ... per rollout
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter

CSV = "metrics.csv"


class Logger:
    """Writes a run's metrics into its folder.

    Args:
        folder: the run folder.
        step: where a resumed run goes on, in timesteps; 0 for a new one.
        csv_bytes: length of metrics.csv at that step: what an interrupted run wrote later is dropped.

    Raises:
        ValueError: metrics.csv is shorter than that.
    """

    def __init__(self, folder: Path, step: int = 0, csv_bytes: int = 0):
        self._csv = (folder / CSV).open("a", newline="")
        if self._csv.tell() < csv_bytes:
            has = self._csv.tell()
            self._csv.close()
            raise ValueError(f"{folder / CSV} must have the {csv_bytes} bytes of the run's checkpoint, got {has}")
        self._csv.truncate(csv_bytes)
        if csv_bytes == 0:
            self._csv.write("step,name,value\n")
        self._tensorboard = SummaryWriter(folder / "tb", purge_step=step + 1)

    def record(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._csv.write(f"{step},{name},{float(value):.8g}\n")
            self._tensorboard.add_scalar(name, value, step)
        self._csv.flush()  # whoever watches the run reads this file

    def flush(self) -> int:
        """Write out what is recorded so far; returns the length of metrics.csv in bytes, for the checkpoint."""
        self._tensorboard.flush()
        self._csv.flush()
        return self._csv.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._csv.close()
        self._tensorboard.close()


@contextmanager
def timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    """Write the wall time of the with block, in milliseconds, into metrics[name]."""
    start = time.perf_counter()
    yield
    metrics[name] = 1e3 * (time.perf_counter() - start)
