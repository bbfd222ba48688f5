"""An environment to test worker processes with, which import this file and so nothing heavy."""

import os
from functools import partial

import gymnasium as gym
import numpy as np

from rl.envs.workers import Workers


class Counter(gym.Env):
    """Shows a random start plus the number of steps, and the sum of its actions; time runs out after `length` steps."""

    observation_space = gym.spaces.Box(0, 1e6, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    word = "none"

    def __init__(self, length: int):
        self.length = int(length)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.steps, self.moved = self.np_random.integers(1000), 0, 0.0
        return self.show(), {}

    def step(self, action):
        if action == 1:
            os._exit(3)
        if action == -1:
            raise ValueError("an action that fails")
        self.steps += 1
        self.moved += float(action[0])
        return self.show(), float(self.steps), False, self.steps == self.length, {"moved": self.moved}

    def show(self) -> np.ndarray:
        return np.array([self.start + self.steps, self.moved], np.float32)

    def learn(self, word: str) -> str:
        self.word, forgotten = word, self.word
        return forgotten


def count(lengths: tuple[int, ...] = (2, 3, 9), num_workers: int = 2) -> Workers:
    makers = {f"count to {length}": partial(Counter, length) for length in lengths}
    return Workers(makers, Counter.observation_space, Counter.action_space, num_workers, info=("moved",))
