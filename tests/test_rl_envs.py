"""rl/envs: the suites, and the pool that steps them."""

import os
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest

from rl.envs import SUITES
from rl.envs.pool import EnvPool


def test_suites_show_what_the_agents_expect():
    for task in SUITES["mt7"]:
        env = task()
        assert env.observation_space.shape == (7, 7, 3) and env.observation_space.dtype == np.uint8
        assert env.action_space.n == 7
        assert env.unwrapped.max_steps == task.max_steps
        assert task.score(1 - 0.9 * task.optimal_steps / task.max_steps) == pytest.approx(1)
        env.close()


def test_any_number_of_processes_gives_the_same_steps():
    def play(num_processes):
        actions = np.random.default_rng(0)
        with EnvPool(SUITES["mt3"] * 2, num_processes) as pool:
            seen = [pool.reset(range(6), np.arange(6))]
            for _ in range(60):
                seen += pool.step([0, 1, 4], actions.integers(7, size=3))[:4]
            return seen

    for one, several in zip(play(1), play(3), strict=True):
        np.testing.assert_array_equal(one, several)


def test_pool_gives_the_last_observation_of_an_ended_episode_and_the_first_of_the_next():
    with EnvPool([CountToThree(), CountToThree()]) as pool:
        pool.reset([0, 1], np.array([10, 20]))
        pool.step([0], np.array([0]))  # environment 1 is left alone
        for _ in range(2):
            step = pool.step([0, 1], np.array([0, 0]))
    assert step.truncated.tolist() == [True, False]
    assert step.final_observations[0] == 13 and step.observations.tolist() == [10, 22]


def test_dead_worker_is_reported_with_its_exit_code():
    with EnvPool([CountToThree(), Dying()], num_processes=2) as pool:
        pool.reset([0, 1], np.zeros(2))
        with pytest.raises(RuntimeError, match=r"environments \[1\] died with exit code 7"):
            pool.step([0, 1], np.zeros(2))


@dataclass
class CountToThree(gym.Env):
    """Shows its seed plus the number of steps; time runs out after three."""

    observation_space = gym.spaces.Box(0, 100, (), np.int64)
    action_space = gym.spaces.Discrete(2)

    def __call__(self):
        return self

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = self.seed if seed is None else seed, 0
        return self.seed, {}

    def step(self, action):
        self.steps += 1
        return self.seed + self.steps, 1.0, False, self.steps == 3, {}


class Dying(CountToThree):
    def step(self, action):
        os._exit(7)
