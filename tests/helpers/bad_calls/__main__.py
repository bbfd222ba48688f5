"""Runs the calls in processes forked from one that has imported torch. A crash is of the call that was at work."""

import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator

import torch

from . import CALLS, Call, checkpoints, conversions, layers, layouts, products, rules  # noqa: F401

SECONDS = 20  # that a call may take
CALLS_OF_A_CHILD = 20  # a fork takes as long as several calls


def outcome(call: Call) -> str:
    """In a child: "" if the call ends as it should, else what is wrong."""
    signal.alarm(SECONDS)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.run()
    except (ValueError, TypeError, RuntimeError) as error:
        if call.refused is None:
            return f"refused: {type(error).__name__}: {error}"
        fault = call.fault_of(str(error))
        return fault and f"{fault}: {type(error).__name__}: {error}"
    except BaseException as error:
        return f"no sentence: {type(error).__name__}: {error}"
    return "" if call.refused is None else "accepted without a word"


def outcomes(calls: list[Call]) -> Iterator[str]:
    """Of every call; children take some each, and one that dies has told how far it came."""
    while calls:
        told, code = in_child(calls[:CALLS_OF_A_CHILD])
        yield from told
        if code:
            yield f"crashed: {signal.Signals(-code).name if code < 0 else code}"
        calls = calls[len(told) + bool(code) :]


def in_child(calls: list[Call]) -> tuple[list[str], int]:
    """The outcomes of these calls up to one that ended the child, and how that ended: 0 if it came to the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for call in calls:
            os.write(writing, json.dumps(outcome(call)[:2000]).encode() + b"\n")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = [json.loads(line) for line in pipe]
    return told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy every page of what it shares with its parent
    found = [(call.name, said) for call, said in zip(CALLS, outcomes(CALLS), strict=True)]
    faults = {name: said for name, said in found if said}
    json.dump({"calls": len(found), "faults": faults}, sys.stdout, indent=1)
