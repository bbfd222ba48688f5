"""rl/algorithms/timestep: what a timestep leaves, and that a CUDA graph could hold it."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl.algorithms import timestep as room
from rl.algorithms.capture import WARMUP
from rl.algorithms.replay import Replay
from rl.algorithms.sac import SAC
from rl.algorithms.timestep import Parcel, Timestep
from rl.config import Config, SACConfig

TASKS, FEATURES, ACTIONS, BATCH, CAPACITY = 3, 7, 2, 5, 20


class Tape(TorchDispatchMode):
    """Stands in for Captured on a CPU: the kernels of the first call after the warm-up, with their very tensors.

    Whatever Python computes in that call, and its numbers, are the same in all later ones, as in a CUDA graph.
    """

    def __init__(self, function):
        super().__init__()
        self.function, self.calls, self.taped = function, 0, []

    def reset(self):
        self.calls, self.taped = 0, []

    def __call__(self):
        self.calls += 1
        if self.calls <= WARMUP:
            self.function()
        elif not self.taped:
            with self:
                self.function()
        else:
            for function, args, kwargs, found in self.taped:
                with torch.no_grad():
                    again = tree_leaves(function(*args, **kwargs))
                    for old, new in zip(found, again, strict=True):
                        if old is not None and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a number"
        found = function(*args, **(kwargs or {}))
        if not function.is_view and function.namespace != "profiler":
            self.taped.append((function, args, kwargs or {}, tree_leaves(found)))
        return found


def make(treatment, captured, monkeypatch):
    monkeypatch.setattr(room, "Captured", Tape)
    sac = SACConfig(batch=BATCH, warmup=1, capacity=CAPACITY, device="cpu")
    config = Config(suite="mt10", agent="mtsac", treatment=treatment, sac=sac, density=0.3)
    agent = SAC(config, Replay(CAPACITY, TASKS, FEATURES, ACTIONS), TASKS, FEATURES, ACTIONS, "cpu")
    agent.captured = captured
    agent.replay.add(*(torch.full((TASKS, width), 0.5) for width in agent.replay.widths))
    return agent, Timestep(agent)


def happenings(timesteps):
    """Observations, noise and outcome of these timesteps."""
    draw = np.random.default_rng(0)
    for _ in range(timesteps):
        observations, following = draw.standard_normal((2, TASKS, FEATURES)).astype(np.float32)
        noise = torch.from_numpy(draw.standard_normal((TASKS, ACTIONS)).astype(np.float32))
        yield observations, noise, (draw.random(TASKS), following, draw.random(TASKS) < 0.2)


def play(timestep, timesteps, seed=0):
    """An episode; returns its actions."""
    actions = []
    timestep.begin(torch.Generator().manual_seed(seed))
    for observations, noise, outcome in happenings(timesteps):
        actions.append(timestep.start(observations, noise).copy())
        timestep.finish()
        timestep.arrive(*outcome)
    timestep.end()
    return np.stack(actions)


@pytest.mark.parametrize("treatment", ["dense", "set"])
def test_a_graph_that_is_replayed_does_what_the_plain_functions_do(treatment, monkeypatch):
    agents, timesteps = zip(*(make(treatment, captured, monkeypatch) for captured in (False, True)), strict=True)
    for episode in range(3):  # more transitions than the replay holds
        actions = [play(timestep, 10, episode) for timestep in timesteps]
        np.testing.assert_array_equal(*actions)
        assert torch.equal(timesteps[0].stats, timesteps[1].stats)
    act, update = timesteps[1]._graphs
    assert len(act.taped) > 10 and len(update.taped) > 100 and act.calls == update.calls == 30
    stored = [agent.replay.storage[:CAPACITY] for agent in agents]
    assert torch.equal(*stored) and agents[0].replay.added == agents[1].replay.added == 31
    for one, other in zip(agents[0].critic.network.parameters(), agents[1].critic.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_transition_is_stored_whole_in_its_place_and_none_is_made_of_two_episodes(monkeypatch):
    agent, timestep = make("dense", False, monkeypatch)
    actions = np.concatenate([play(timestep, 4), play(timestep, 4)])
    assert agent.replay.added == 9
    stored = agent.replay.storage[1:9].split(agent.replay.widths, dim=-1)
    for i, (observations, _, outcome) in enumerate([*happenings(4), *happenings(4)]):
        expected = (observations, actions[i], outcome[0][:, None], outcome[1], outcome[2][:, None])
        for part, value in zip(stored, expected, strict=True):
            np.testing.assert_allclose(part[i], value, rtol=1e-6)


def test_an_update_sees_the_transition_that_has_just_arrived(monkeypatch):
    agent, timestep = make("dense", False, monkeypatch)
    drawn, step = [], agent.step

    def note(timesteps, noise, generator):
        drawn.append(agent.replay.batch(timesteps))
        return step(timesteps, noise, generator)

    agent.step = note
    play(timestep, 12)
    outcomes = [outcome for _, _, outcome in happenings(12)]
    latest = [outcomes[i - 1][0].astype(np.float32) for i in range(1, 12)]
    seen = [np.isin(batch.rewards.numpy(), rewards).any() for batch, rewards in zip(drawn[1:], latest, strict=True)]
    assert seen[0] and sum(seen) > 6


def test_memory_that_has_moved_is_captured_again(monkeypatch):
    agent, timestep = make("dense", True, monkeypatch)
    for moved, timesteps, taped in ((0, 5, True), (1, 1, False), (1, 3, True)):
        monkeypatch.setattr(SAC, "compactions", moved)
        play(timestep, timesteps)
        assert [bool(graph.taped) for graph in timestep._graphs] == [taped, taped]


def test_the_parts_of_a_parcel_are_aligned_and_have_memory_of_their_own():
    parcel = Parcel("cpu", one=((3,), torch.float32), two=((2, 2), torch.int64), three=((1,), torch.float32))
    for value, part in enumerate(vars(parcel.host).values()):
        assert part.data_ptr() % part.element_size() == 0
        part.fill_(value)
    parcel.send()
    assert [part.unique().tolist() for part in vars(parcel.device).values()] == [[0], [1], [2]]
