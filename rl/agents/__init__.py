"""The agents by their command-line names: networks called with observations and task ids, as MTPPO says."""

from rl.agents.mtppo import MTPPO

AGENTS = {"mtppo": MTPPO}
