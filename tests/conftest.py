"""What every test shares: new memory is NaN, randomness is seeded, nothing is compiled yet, hypothesis has time."""

import os
import sys

import hypothesis
import numpy as np
import pytest
import torch

import sparsekern as sk
from sparsekern import choose

# pytest-benchmark times nothing in processes that a worker of pytest-xdist has started
os.environ.pop("PYTEST_XDIST_WORKER", None)

hypothesis.settings.register_profile("sparsekern", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("sparsekern")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an unwritten element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What a test has compiled counts against torch's limit of recompilations, in whichever order tests run."""
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch.compiler.reset()


@pytest.fixture(params=["reference", "cpu", "chosen"])
def backend(request):
    """Run a test under every backend that takes CPU tensors, and under the one that the chooser picks."""
    if request.param == "chosen":
        yield request.param
        return
    if reason := choose.BACKENDS[request.param].unavailable():
        pytest.skip(reason)
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if request.param == "cpu" and dtype not in (None, torch.float32, torch.bfloat16):
        pytest.skip(f"backend 'cpu' does not take {dtype}")
    with sk.use(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    """The problems are small: on a busy machine, threads that wait for one another take ten times as long as one."""
    torch.set_num_threads(1)
