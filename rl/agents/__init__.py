"""The agents by their command-line names: networks that map (observations, task ids) to one output per row."""

from rl.agents.mtppo import MTPPO

AGENTS = {"mtppo": MTPPO}
