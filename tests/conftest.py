"""What every test shares: uninitialised memory is NaN, randomness is seeded, hypothesis has time."""

import hypothesis
import numpy as np
import pytest
import torch

import sparsekern as sk
from sparsekern import choose

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


@pytest.fixture(params=choose.BACKENDS)
def backend(request):
    """Run a test under every backend that this machine has."""
    try:
        forced = sk.use(request.param)
        forced.__enter__()
    except RuntimeError as missing:
        pytest.skip(str(missing))
    yield request.param
    forced.__exit__(None, None, None)


@pytest.fixture
def one_thread():
    """Run a test on one thread of torch, and leave the number of threads as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
