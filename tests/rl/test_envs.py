"""rl/envs: the suites, and the pool that steps them."""

import gymnasium as gym
import numpy as np
import pytest
from minigrid.wrappers import ImgObsWrapper

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


@pytest.mark.parametrize("task", SUITES["mt7"], ids=lambda task: task.name)
def test_remembered_views_are_the_package_s_own(task):
    remembering, plain = task(), ImgObsWrapper(gym.make(f"MiniGrid-{task.name}-v0"))
    # forward, pick up and toggle more often: random actions seldom open a door
    actions = np.random.default_rng(0).choice(7, size=800, p=[0.1, 0.1, 0.3, 0.15, 0.05, 0.25, 0.05]).tolist()
    np.testing.assert_array_equal(remembering.reset(seed=1)[0], plain.reset(seed=1)[0])
    for action in actions:
        observation, *rest = remembering.step(action)
        expected, *others = plain.step(action)
        np.testing.assert_array_equal(observation, expected)
        assert rest == others
        if rest[1] or rest[2]:
            np.testing.assert_array_equal(remembering.reset()[0], plain.reset()[0])


def test_pool_gives_the_last_observation_of_an_ended_episode_and_the_first_of_the_next():
    pool = EnvPool([CountToThree, CountToThree])
    assert pool.reset([0, 1], np.array([10, 20])).tolist() == [10, 20]
    pool.step([0], np.array([0]))  # environment 1 is left alone
    for _ in range(2):
        step = pool.step([0, 1], np.array([0, 0]))
    assert step.truncated.tolist() == [True, False]
    assert step.next_observations.tolist() == [13, 22]
    assert step.observations.tolist() == [10, 22]


class CountToThree(gym.Env):
    """Shows its seed plus the number of steps; time runs out after three."""

    observation_space = gym.spaces.Box(0, 100, (), np.int64)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = self.seed if seed is None else seed, 0
        return self.seed, {}

    def step(self, action):
        self.steps += 1
        return self.seed + self.steps, 1.0, False, self.steps == 3, {}
