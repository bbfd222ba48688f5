"""Weight decay of 1e-6, as Adam's L2 term: it is added to the gradient, before the moments."""

from rl.config import Config


def optimizer_options(config: Config) -> dict[str, float]:
    return {"weight_decay": config.weight_decay}
