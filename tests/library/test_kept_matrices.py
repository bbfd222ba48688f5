"""The dense path's copy of a weight: the backward of a step takes the forward's, where there are few tokens."""

import pytest
import torch
from oracle import random_topology, rewire_at_random
from torch.multiprocessing.reductions import StorageWeakRef

import sparsekern as sk
from sparsekern.backends import dense, reference

KINDS = pytest.mark.parametrize("kind", ["plain", "groups", "ragged"])


@pytest.fixture
def made(monkeypatch):
    """Weak references to the dense matrices that are made, while the dense path is forced."""
    found, densify = [], dense.densify

    def noted(weight, layout):
        matrices = densify(weight, layout)
        found.append(StorageWeakRef(matrices.untyped_storage()))
        return matrices

    monkeypatch.setattr(dense, "densify", noted)
    with sk.use("dense"):
        yield found


def problem(kind="plain", block_size=4):
    topology = random_topology((3, 4), block_size, 1 if kind == "plain" else 2, live=0.5, dead=1)
    groups = 2 if kind == "ragged" else 1
    x = torch.randn(9, topology.shape[1] // groups, requires_grad=True)
    weight = torch.randn(topology.num_slots, block_size, block_size)
    weight[topology.block_rows < 0] = 0
    offsets = torch.tensor([0, 4, 9]) if kind == "ragged" else None
    return topology, x, weight.requires_grad_(), torch.randn(topology.shape[0], requires_grad=True), offsets


def gradients(topology, x, weight, bias, offsets):
    y = sk.dds(x, weight, topology, bias, transpose=True, token_offsets=offsets)
    return y, *torch.autograd.grad(y.square().sum(), [t for t in (x, weight, bias) if t.requires_grad])


@KINDS
def test_a_step_of_the_dense_path_makes_one_dense_matrix_and_its_gradients_are_those_of_two(made, kind, monkeypatch):
    operands = problem(kind)
    kept = gradients(*operands)
    assert len(made) == 1
    monkeypatch.setattr(dense, "MOST_TOKENS_TO_KEEP", 8)  # one fewer than there are
    apart = gradients(*operands)
    assert len(made) == 3
    for ours, theirs in zip(kept, apart, strict=True):
        assert torch.equal(ours, theirs)


def test_a_dense_matrix_is_freed_after_the_backward_and_at_once_where_no_backward_wants_it(made):
    topology, x, weight, bias, _ = problem()
    y = sk.dds(x, weight, topology, bias, transpose=True)
    assert not made[0].expired()
    y.sum().backward()
    assert made[0].expired() and len(made) == 1
    for operands in ((x.detach(), weight), (x.detach(), weight.detach())):
        y = sk.dds(*operands, topology, transpose=True)
        assert made[-1].expired()
    with torch.no_grad():
        y = sk.dds(x, weight, topology, transpose=True)
    assert made[-1].expired() and len(made) == 4


def test_a_frozen_weight_keeps_its_dense_matrix_for_the_gradient_of_x(made):
    topology, x, weight, _, _ = problem()
    gradients(topology, x, weight.detach(), torch.zeros(topology.shape[0]), None)
    assert len(made) == 1


def test_a_rewire_and_an_update_of_the_weight_before_the_backward_are_refused(made):
    topology, x, weight, bias, _ = problem()
    y = sk.dds(x, weight, topology, bias, transpose=True)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = sk.dds(x, weight, topology, bias, transpose=True)
    rewire_at_random(topology, 0)
    with pytest.raises(RuntimeError, match="rewired, pruned or loaded after the forward"):
        y.sum().backward()


@KINDS
def test_gradients_of_gradients_go_through_the_weight(made, kind, monkeypatch):
    monkeypatch.setattr(dense, "_copies", lambda x: reference)  # which takes float64
    topology, *tensors, offsets = problem(kind, block_size=2)
    tensors = [t.detach().double().requires_grad_() for t in tensors]

    def product(x, weight, bias):
        # the gradient of a dead slot is zero whatever it holds
        live = (topology.block_rows >= 0)[:, None, None]
        return sk.dds(x, torch.where(live, weight, 0), topology, bias, transpose=True, token_offsets=offsets)

    assert torch.autograd.gradgradcheck(product, tensors)


def test_a_backend_that_is_forced_between_forward_and_backward_makes_the_gradient(made):
    topology, x, weight, bias, _ = problem()
    y = sk.dds(x, weight, topology, bias, transpose=True)
    with sk.use("reference"):
        (dx,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(sk.dds(x, weight, topology, bias, transpose=True).sum(), x)
    assert torch.equal(dx, expected) and len(made) == 1


def test_other_backends_keep_nothing(made):
    topology, x, weight, bias, _ = problem()
    with sk.use("reference"):
        y = sk.dds(x, weight, topology, bias, transpose=True)
    assert len(y.grad_fn.saved_tensors) == 3 and not made
