"""rl/envs: Meta-World's MT10, and the processes that step it; its evaluation."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from rl.envs.workers import Workers, share_out
from rl.evaluate import evaluate_mt10, judge_mt10
from rl.seeds import Stream, numpy_generator

ROOT = Path(__file__).parents[1]


class Counter(gym.Env):
    """Shows its seed plus the number of steps, and the sum of its actions; time runs out after `length`."""

    observation_space = gym.spaces.Box(0, 1e6, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    patience = 0

    def __init__(self, length):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.np_random.integers(1000)
        self.steps, self.moved = 0, 0.0
        return self.show(), {}

    def step(self, action):
        self.steps += 1
        self.moved += action.item()
        if action == 1:
            os._exit(3)
        if action == -1:
            raise ValueError("an action that fails")
        return self.show(), self.steps, False, self.steps == self.length, {"moved": self.moved}

    def show(self):
        return np.array([self.start + self.steps, self.moved], np.float32)

    def be_patient(self, patience):
        self.patience = patience


def counters(num_workers=2):
    makers = {f"task{length}": partial(Counter, length) for length in (2, 3, 9)}
    return Workers(makers, Counter.observation_space, Counter.action_space, num_workers, info=("moved",))
