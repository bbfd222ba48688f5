"""The MiniGrid tasks and the suites MT3, MT5 and MT7 made of them."""

from dataclasses import dataclass

import gymnasium as gym
import minigrid  # noqa: F401  (registers its environments with gymnasium)
from minigrid.wrappers import ImgObsWrapper


@dataclass(frozen=True)
class Task:
    """One environment; calling it makes one instance, which shows uint8 [7, 7, 3] and takes one of 7 actions."""

    name: str
    """The gymnasium id without `MiniGrid-` and version: the task's name in metrics and tables."""
    optimal_steps: int
    """Length of an optimal episode, in steps (Table 4 of the paper)."""
    max_steps: int
    """Steps after which the environment truncates an episode."""

    def __call__(self) -> gym.Env:
        # the checker calls every environment's step twice as slowly and is meant for authors of environments
        return ImgObsWrapper(gym.make(f"MiniGrid-{self.name}-v0", disable_env_checker=True))

    def score(self, episode_return: float) -> float:
        """The return as a share of what an optimal episode earns: 1 - 0.9 * optimal_steps / max_steps."""
        return episode_return / (1 - 0.9 * self.optimal_steps / self.max_steps)

    def solved(self, episode_return: float) -> bool:
        return episode_return > 0  # only the goal is rewarded


MT3 = (Task("LavaGapS7", 8, 196), Task("RedBlueDoors-6x6", 8, 720), Task("MemoryS11", 15, 605))
MT5 = (*MT3, Task("DoorKey-6x6", 11, 360), Task("DistShift1", 11, 252))
MT7 = (*MT5, Task("SimpleCrossingS9N2", 15, 324), Task("MultiRoom-N2-S4", 5, 40))
