"""The whole update of MTSAC on MT10 (two critics, actor, temperatures, targets; 128 transitions per task)."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

import sparsekern as sk
from bench.case import GPU, THREADS, Case, Sizes
from bench.networks import check_close
from rl.algorithms.replay import Replay
from rl.algorithms.sac import SAC
from rl.algorithms.timestep import Timestep
from rl.config import Config, SACConfig

TASKS, FEATURES, ACTIONS, PER_TASK = 10, 49, 4, 128


def cases(block_sizes, threads) -> list[Case]:
    """Their shape is that of the hidden layers."""
    return [Case(400, 400, TASKS * PER_TASK, 0.05, block, number) for number in threads for block in block_sizes]


CASES = {"smoke": cases([16], [1]), "quick": cases([1, 16], [1]), "full": cases([1, 16], THREADS)}


def gpu_cases(sizes: Sizes) -> list[Case]:
    if GPU == "cpu":  # no kernels of block 1 to rehearse
        return []
    shape = 400, 400, TASKS * PER_TASK, 0.05
    return [Case(*shape, block_size, 1, device=GPU, arithmetic="float32") for block_size in sizes.block_sizes[::-1]]


def agent(case: Case, treatment: str) -> SAC:
    """With a replay of random transitions; the same call makes the same agent."""
    sac = SACConfig(batch=PER_TASK, device=case.device)
    settings = {"density": case.density, "block_size": case.block_size, "sac": sac}
    config = Config(suite="mt10", agent="mtsac", treatment=treatment, **settings)
    replay = Replay(1000, TASKS, FEATURES, ACTIONS, case.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        replay.add(*(torch.rand(TASKS, width, generator=generator) for width in replay.widths))
    return SAC(config, replay, TASKS, FEATURES, ACTIONS, case.device)


def check(case: Case) -> None:
    """Compare what an update reports, and the parameters it leaves, with those of the reference backend."""
    found = []
    for backend in (None, "reference"):
        own = agent(case, "set")
        with sk.use(backend) if backend else nullcontext():
            stats = own.update(torch.Generator().manual_seed(1))
        found.append([stats, *(p.detach() for p in own.critic.network.parameters())])
    check_close(*found)


def timestep(agent: SAC) -> Callable[[], None]:
    """What a training does in a timestep, but for the environments."""
    own, generator = Timestep(agent), torch.Generator().manual_seed(2)
    observations, noise = np.zeros((TASKS, FEATURES), np.float32), torch.zeros(TASKS, ACTIONS)
    own.begin(generator)

    def call():
        own.start(observations, noise)
        own.finish()
        own.arrive(np.zeros(TASKS), observations, np.zeros(TASKS))

    return call


@pytest.mark.clocks("host")  # rl captures a timestep in a graph of its own
def bench_update(compare, record, case):
    check(case)
    agents = agent(case, "set"), agent(case, "dense")
    if case.device == "cuda":  # where an update costs the host more than the device, if it is no graph
        name, calls = "timestep", [timestep(own) for own in agents]
    else:
        name, generator = "update", torch.Generator().manual_seed(2)
        calls = [partial(own.update, generator) for own in agents]
    learners = (agents[0].actor, agents[0].critic)
    live = sum(l.live_parameters() for l in learners) / sum(l.dense_parameters for l in learners)
    record(name, partner="dense", **compare(*calls), live=live)
