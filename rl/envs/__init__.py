"""The suites by their command-line names."""

from rl.envs.minigrid import MT3, MT5, MT7

SUITES = {"mt3": MT3, "mt5": MT5, "mt7": MT7}
