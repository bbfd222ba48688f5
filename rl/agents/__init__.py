"""The agents by their command-line names: networks called with observations and task ids, as MTPPO says.

What treatments and metrics need to know of them: `encoder` gives each expert's features, `activation` the features that
all heads share, `heads` turns these into outputs. MTSAC has a network of its own for each role (rl/agents/mtsac.py).
"""

from rl.agents.moe import MoE
from rl.agents.moore import MOORE
from rl.agents.mtppo import MTPPO

AGENTS = {"mtppo": MTPPO, "moe": MoE, "moore": MOORE}
