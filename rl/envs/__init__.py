"""The suites by their command-line names: MT3, MT5, MT7, and each task of MT7 alone, by its own name; MT10."""

from rl.envs.metaworld import MT10
from rl.envs.minigrid import MT3, MT5, MT7

SUITES = {"mt3": MT3, "mt5": MT5, "mt7": MT7, "mt10": MT10} | {task.name: (task,) for task in MT7}
