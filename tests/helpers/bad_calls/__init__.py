"""Calls that no one should make. `PYTHONPATH=tests/helpers python -m bad_calls` prints what became of them.

A call is refused by a sentence that names what is wrong, or works and has the right value. Anything else is a fault: a
crash, an answer without a word, or an error of Python's or torch's own that names nothing of ours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import sparsekern as sk


@dataclass(frozen=True)
class Call:
    name: str
    run: Callable[[], object]
    refused: str | None
    """what the sentence must say, as a regular expression; None: the call works and checks its value itself"""
    values: tuple[tuple[str, ...], ...] = ()
    """of each bad value the words for it, one of which the sentence must say"""

    def fault_of(self, sentence: str) -> str:
        """What a refusal lacks; "" if it says what it should."""
        if not re.search(self.refused, sentence):
            return "no sentence of ours"
        missing = [words[0] for words in self.values if not any(word in sentence for word in words)]
        return f"does not say {', '.join(missing)}" if missing else ""


CALLS: list[Call] = []


def refused(name: str, run: Callable[[], object], sentence: str, *bad: object) -> None:
    """A call that is refused by this sentence, in which the bad values stand: as Python writes them, or their types."""
    CALLS.append(Call(name, run, sentence, tuple(map(_words_for, bad))))


def _words_for(value: object) -> tuple[str, ...]:
    if isinstance(value, nn.Module):  # what is wrong with a module has many names
        return ("",)
    inside = value if isinstance(value, list) else ()
    return repr(value), type(value).__name__, *(word for one in inside for word in _words_for(one))


def works(name: str, run: Callable[[], object]) -> None:
    CALLS.append(Call(name, run, None))


LAYERS = {
    "block 8": {"density": 0.4, "block_size": 8},
    "block 1": {"density": 0.4, "block_size": 1},
    "full": {"density": 1.0, "block_size": 8},
    "padded": {"density": 0.4, "block_size": 16},
    "groups": {"density": 0.5, "block_size": 4, "groups": 2},
    "groups of block 1": {"density": 0.5, "block_size": 1, "groups": 2},
}


def layer(kind: str = "block 8", **options) -> sk.SparseLinear:
    return sk.SparseLinear(24, 40, **LAYERS[kind] | options)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))


def sparse_model(density: float = 0.4) -> nn.Sequential:
    return sk.sparsify(model(), density=density, block_size=8)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
