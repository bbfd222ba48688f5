"""Lottery ticket: the weights that a finished run of GMP kept, with their first values, trained anew on their own.

The ticket is a run folder of the same suite, agent and seed: the seed gives the first values, the folder's checkpoint
the weights that live. These never change again, so there is nothing to do during training.
"""

import sparsekern as sk
from rl import checkpoint
from rl.config import Config
from rl.treatments.context import Context


def prepare(context: Context) -> None:
    saved = checkpoint.load(context.config.ticket)
    kept = saved.get("agent", saved)[context.role]["network"]  # SAC saves its networks as one agent
    plan = sk.plan_from(kept)
    masks = {}
    for layer in plan.layers:
        rows, cols = (kept[f"{layer.name}.topology.block_{side}"] for side in ("rows", "cols"))
        masks[layer.name] = sk.Topology(rows, cols, layer.shape, layer.block_size, layer.groups).mask()
    sk.sparsify(context.network, plan, keep=masks)


def require_ticket(config: Config) -> None:
    """Raise ValueError unless the ticket is a finished run of gmp that began as this run does."""
    ticket, saved = Config.load(config.ticket), checkpoint.load(config.ticket)
    for name in ("suite", "agent", "seed", "networks", "density", "block_size", "gmp"):
        if getattr(ticket, name) != getattr(config, name):
            raise ValueError(
                f"lottery: ticket and run must have the same {name}, got {getattr(ticket, name)!r} and "
                f"{getattr(config, name)!r}"
            )
    if "gmp" not in ticket.treatment or saved is None or saved["clock"] < ticket.timesteps:
        raise ValueError(f"lottery: {config.ticket} must be a finished run of treatment gmp with its checkpoint")
