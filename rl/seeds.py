"""Every random number of a run is drawn from (seed, stream, clock): a checkpoint has no generator to save.

A stream names what the numbers are for, so that asking for more of one (longer evaluations, say) leaves the others as
they were. The clock is the timestep at which the drawing starts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    ACTOR = 0  # initial weights and topology
    CRITIC = 1
    ROLLOUT = 2
    MINIBATCH = 3
    EVALUATION = 4
    METRICS = 5
    TREATMENT = 6  # drawn from a treatment's own seed, which differs between actor and critic
    GOALS = 7  # between which Meta-World's environments choose
    RESET = 8  # what they choose from then on


def numpy_generator(seed: int, stream: Stream, clock: int = 0) -> np.random.Generator:
    return np.random.default_rng((seed, stream, clock))


def torch_generator(seed: int, stream: Stream, clock: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(int(numpy_generator(seed, stream, clock).integers(2**63)))


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Inside, what draws from torch's own generators (the initialisation of a layer) is seeded as this fresh one."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator.initial_seed())
        yield
