from contextlib import nullcontext

import numpy as np
import oracle
import pytest
import torch
from oracle import random_topology
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.rewire.growth import GrowthScores, arm, best_candidates, float_bits, positions_of, scores_of


def watched(topology):
    out, into = topology.shape
    layer = sk.SparseLinear(into, out, topology=topology)
    layer.growth = GrowthScores(layer.topology)
    arm([layer.growth], True)
    return layer


def keys_of(layer):
    """int64 [groups, count]: the best dead blocks, best first, as RigL takes them."""
    scores, topology = layer.growth.scores, layer.topology
    if topology.block_size == 1:
        return scores
    dead = topology.num_blocks // topology.groups - min(topology.live_per_group())
    return best_candidates(topology.layout, dead, lambda strip, _: float_bits(scores[:, strip].flatten(1)))


def block_norms(topology, dy, x, offsets=None):
    """Squared norms of the blocks of the dense gradient, float64 [groups, rows, cols]."""
    b, (groups, rows, cols) = topology.block_size, topology.mask().shape
    dense = oracle.outer(dy.double().numpy(), x.detach().double().numpy(), groups, offsets)
    padded = np.zeros((groups, rows * b, cols * b))
    padded[:, : dense.shape[1], : dense.shape[2]] = dense
    return (padded.reshape(groups, rows, b, cols, b) ** 2).sum((2, 4))


def check_keys(layer, norms, rel=1e-5):
    """The keys hold every dead block's score, best first, and no live block."""
    mask = layer.topology.mask().numpy()
    for g, keys in enumerate(keys_of(layer)):
        expected = norms[g][~mask[g]]
        count = min(len(keys), len(expected))
        positions = positions_of(keys)[:count].numpy()
        assert not mask[g].ravel()[positions].any()
        scores = scores_of(keys)[:count].numpy()
        np.testing.assert_allclose(scores, norms[g].ravel()[positions], rtol=rel)
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:count], rtol=rel)
        assert (keys[count:] == -1).all()


@pytest.mark.parametrize("strip", [1, 7, 2**20])
@pytest.mark.parametrize(("block_size", "groups"), [(1, 1), (1, 2), (4, 1), (8, 3)])
def test_scores_are_the_squared_norms_of_the_dense_gradient_at_dead_blocks(
    monkeypatch, backend, block_size, groups, strip
):
    monkeypatch.setattr("sparsekern.rewire.growth.STRIP", strip)
    monkeypatch.setattr("sparsekern.backends.reference.STRIP", strip)
    layer = watched(random_topology((5, 4), block_size, groups, padding=(0, block_size // 2), dead=1))
    x, dy = torch.randn(9, layer.in_features), torch.randn(9, layer.out_features)
    layer(x).backward(dy)
    check_keys(layer, block_norms(layer.topology, dy, x))


def test_no_more_than_a_strip_of_the_dense_gradient_is_held(monkeypatch):
    monkeypatch.setattr("sparsekern.backends.reference.STRIP", 2 * 8 * 8 * 4)  # two block rows of each group
    sizes = []

    def outer(*operands):
        sizes.append(dense(*operands))
        return sizes[-1]

    dense = reference.outer
    monkeypatch.setattr(reference, "outer", outer)
    layer = watched(random_topology((6, 4), 8, live=0.3))
    with sk.use("reference"):
        layer(torch.randn(3, layer.in_features)).backward(torch.ones(3, layer.out_features))
    strips = [tuple(s.shape) for s in sizes]
    assert strips.count((1, 16, 32)) == 3 and len(strips) == 4  # the fourth is the reference's own weight gradient


@pytest.mark.parametrize("block_size", [1, 4])
def test_ragged_groups_are_scored_by_their_own_tokens(backend, block_size):
    layer = watched(random_topology((5, 4), block_size, 3))
    ids = torch.tensor([0, 0, 0, 0, 2, 2, 2])  # sorted, so that the tokens of a group follow one another
    x, dy = torch.randn(7, layer.in_features // 3), torch.randn(7, layer.out_features // 3)
    layer(x, group=ids).backward(dy)
    check_keys(layer, block_norms(layer.topology, dy, x, [0, 4, 4, 7]))


def test_several_micro_batches_sum_their_squared_norms(backend):
    layer = watched(random_topology((5, 4), 4))
    norms = 0
    for _ in range(3):
        x, dy = torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features)
        layer(x).backward(dy)
        norms = norms + block_norms(layer.topology, dy.flatten(0, 1), x.flatten(0, 1))
    check_keys(layer, norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_scores_agree_with_float64(backend, dtype):
    layer = watched(random_topology((5, 4), 8)).to(dtype)
    x, dy = torch.randn(33, layer.in_features).to(dtype), torch.randn(33, layer.out_features).to(dtype)
    layer(x).backward(dy)
    check_keys(layer, block_norms(layer.topology, dy, x), rel=4 * oracle.BOUND[dtype])


def test_an_unarmed_watcher_scores_nothing_and_arming_starts_anew(backend):
    layer = watched(random_topology((5, 4), 4))
    layer(torch.randn(3, layer.in_features)).sum().backward()
    assert (keys_of(layer) >= 0).any()
    arm([layer.growth], False)
    before = layer.growth.scores.clone()
    layer(torch.randn(3, layer.in_features)).sum().backward()
    assert torch.equal(layer.growth.scores, before)
    arm([layer.growth], True)
    assert (keys_of(layer) == -1).all()
    with torch.no_grad():
        layer(torch.randn(3, layer.in_features))
    assert (keys_of(layer) == -1).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_give_no_candidates(backend, value):
    layer = watched(sk.Topology(torch.tensor([0]), torch.tensor([0]), (8, 8), 4))
    x, dy = torch.ones(2, 8), torch.ones(2, 8)
    dy[0, 5] = value  # the lower two blocks get no finite gradient
    layer(x).backward(dy)
    assert positions_of(keys_of(layer)[0]).tolist() == [1, -1, -1]


def test_watching_changes_neither_output_nor_gradients(backend):
    layer = watched(random_topology((5, 4), 4))
    x, dy = torch.randn(3, layer.in_features, requires_grad=True), torch.randn(3, layer.out_features)
    leaves = (x, layer.weight, layer.bias)
    results = []
    for growth in (layer.growth, None):
        layer.growth = growth
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["linear", "groups", "convolution"])
def test_an_activation_may_write_over_the_output_of_a_watched_layer(kind, compiled):
    if kind == "convolution":
        layer, x = sk.SparseConv2d(4, 8, 3, density=0.3, block_size=4), torch.randn(2, 4, 5, 5)
    else:
        layer = sk.SparseLinear(16, 8, density=0.3, block_size=4, groups=1 if kind == "linear" else 2)
        x = torch.randn(2, 3, 16)
    layer.growth = GrowthScores(layer.topology)
    gradients, scores = [], []
    for inplace in (False, True):
        model = torch.nn.Sequential(layer, torch.nn.ReLU(inplace))
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        arm([layer.growth], True)
        model.zero_grad()
        forward(x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
        scores.append(layer.growth.scores.clone())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(*scores) and scores[0].max() > 0


def test_only_gradients_that_reach_the_weight_are_scored(backend):
    layer = watched(random_topology((5, 4), 4))
    x, dy = torch.randn(3, layer.in_features, requires_grad=True), torch.randn(3, layer.out_features)
    torch.autograd.grad(layer(x), x, dy)  # as adversarial training does before its step
    layer(x).backward(dy, inputs=[x, layer.bias])
    layer.weight.requires_grad_(False)
    layer(x).backward(dy)  # as the generator's step does to a discriminator that is frozen for it
    layer.weight.requires_grad_(True)
    assert (keys_of(layer) == -1).all()
    torch.autograd.grad(layer(x), layer.weight, dy)
    layer(x).backward(dy, inputs=[layer.weight])
    layer(x).backward(dy)
    check_keys(layer, 3 * block_norms(layer.topology, dy, x))


def test_scores_are_the_same_under_checkpoints_hooks_modes_and_compiled_autograd():
    layer = watched(random_topology((5, 4), 4))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    offload, compiler = torch.autograd.graph.save_on_cpu(), torch.compile(backend="eager")
    layer(x).square().sum().backward()
    expected = layer.growth.scores.clone()
    ways = {
        "checkpoint": (nullcontext(), lambda x: checkpoint(layer, x, use_reentrant=False)),
        "reentrant checkpoint": (nullcontext(), lambda x: checkpoint(layer, x, use_reentrant=True)),
        "saved tensors": (offload, layer),
        "dispatch mode": (FlopCounterMode(display=False), layer),
        "compiled autograd": (torch._dynamo.compiled_autograd._enable(compiler), layer),
    }
    for name, (context, forward) in ways.items():
        arm([layer.growth], True)
        with context:
            forward(x).square().sum().backward()
        torch.testing.assert_close(layer.growth.scores, expected, msg=name)


def test_a_watched_layer_is_traced():
    layer = watched(random_topology((5, 4), 4))
    x = torch.randn(2, 3, layer.in_features)
    traced = torch.jit.trace(layer, (x[0],))  # which compares two traces
    torch.testing.assert_close(traced(x[1]), layer(x[1]))
