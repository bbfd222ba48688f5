"""The agents by their command-line names: networks called with observations and task ids, as MTPPO says.

What treatments and metrics need to know of them: `encoder` gives each expert's 1024 features, `activation` the features
that all heads share, `heads` turns these into outputs.
"""

from rl.agents.moe import MoE
from rl.agents.moore import MOORE
from rl.agents.mtppo import MTPPO

AGENTS = {"mtppo": MTPPO, "moe": MoE, "moore": MOORE}
