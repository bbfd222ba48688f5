"""RewireCallbacks for other people's training loops; each framework is imported with its module only."""

from importlib import import_module


def __getattr__(name: str):
    if name in ("lightning", "stable_baselines3", "transformers"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
