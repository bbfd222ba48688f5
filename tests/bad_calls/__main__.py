"""Runs every call in a process of its own, forked from one that has imported torch."""

import gc
import json
import os
import signal
import sys
import warnings

import torch

from . import CALLS, Call, checkpoints, conversions, layers, products, rules  # noqa: F401

SECONDS = 20  # that a call may take


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


def in_child(call: Call) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writing, outcome(call)[:2000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if code == 0 else f"crashed: {signal.Signals(-code).name if code < 0 else code}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy every page of what it shares with its parent
    found = [(call.name, in_child(call)) for call in CALLS]
    json.dump({"calls": len(found), "faults": [pair for pair in found if pair[1]]}, sys.stdout, indent=1)
