"""Coordinates that somebody else writes: the index follows, and nothing follows coordinates that are no topology."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from oracle import dense_weight, random_topology
from torch import nn

import sparsekern as sk

SIZES = pytest.mark.parametrize("block_size", [1, 4])


def trained(block_size, density=0.3):
    """A model that has been rewired a few times, its optimiser, and an input."""
    model = sk.sparsify(nn.Sequential(nn.Linear(16, 24)), density=density, block_size=block_size, keep="fresh")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rule = sk.SET(model, optimizer, update_every=2)
    x = torch.randn(5, 16)
    for _ in range(6):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rule.step()
    return model, optimizer, x


def untrained(block_size, density=0.3):
    return sk.sparsify(nn.Sequential(nn.Linear(16, 24)), density=density, block_size=block_size, keep="fresh")


def assert_computes_its_weight(model, x):
    layer = model[0]
    truth = F.linear(x.double(), torch.from_numpy(dense_weight(layer.weight, layer.topology)[0]), layer.bias.double())
    torch.testing.assert_close(model(x).double(), truth, rtol=1e-4, atol=1e-5)
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x)
    truth = dense_weight(layer.weight, layer.topology)[0].sum(0)
    torch.testing.assert_close(dx[0].double(), torch.from_numpy(truth), rtol=1e-4, atol=1e-5)


@SIZES
def test_copying_a_state_in_place_is_followed_by_the_next_product(block_size):
    source, _, x = trained(block_size)
    target = untrained(block_size)
    for name, value in target.state_dict().items():
        if isinstance(value, torch.Tensor):
            value.copy_(source.state_dict()[name])
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    assert_computes_its_weight(target, x)


@SIZES
def test_a_state_of_the_model_s_own_tensors_is_followed_when_it_is_loaded(block_size, tmp_path):
    import torch.distributed.checkpoint as dcp

    source, _, x = trained(block_size)
    dcp.save({"model": source.state_dict()}, checkpoint_id=tmp_path)
    target = untrained(block_size)
    state = {"model": target.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)  # writes into the tensors of the model
    target.load_state_dict(state["model"])
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    torch.testing.assert_close(sk.densify(copy.deepcopy(target))(x), target(x), rtol=1e-4, atol=1e-5)


@SIZES
def test_what_was_written_in_place_counts_as_loaded_so_stale_optimizer_state_is_told(block_size):
    source, _, _ = trained(block_size)
    model, optimizer, x = trained(block_size)
    rule = sk.SET(model, optimizer, update_every=1)
    with torch.no_grad():
        for name in ("block_rows", "block_cols"):
            getattr(model[0].topology, name).copy_(getattr(source[0].topology, name))
    model(x)
    with pytest.raises(RuntimeError, match="weights of another topology were loaded"):
        rule.step()


@SIZES
def test_copies_and_pickles_of_a_model_written_in_place_compute_its_weight(block_size):
    source, _, x = trained(block_size)
    for copied in (copy.deepcopy, through_a_file, nn.Module.double):
        target = untrained(block_size)
        with torch.no_grad():
            for name in ("block_rows", "block_cols"):
                getattr(target[0].topology, name).copy_(getattr(source[0].topology, name))
        made = copied(target)
        assert_computes_its_weight(made.float(), x)


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_full_store_whose_coordinates_are_permuted_in_place_is_full_no_longer():
    model, x = untrained(4, density=1.0), torch.randn(5, 16)
    topology, order = model[0].topology, torch.randperm(24)
    assert topology.full
    with torch.no_grad():
        topology.block_rows.copy_(topology.block_rows[order])
        topology.block_cols.copy_(topology.block_cols[order])
    assert_computes_its_weight(model, x)
    assert not topology.full


@SIZES
@pytest.mark.parametrize(("value", "message"), [(30000, "outside the"), (0, "is live in two slots")])
def test_coordinates_that_are_no_topology_are_refused_before_anything_follows_them(block_size, value, message):
    model, x = untrained(block_size), torch.randn(5, 16)
    with torch.no_grad():
        model[0].topology.block_rows.fill_(value)
        model[0].topology.block_cols.fill_(value)
    for use in (model, lambda x: sk.sdd(torch.randn(5, 24), x, model[0].topology), lambda x: model[0].to_dense()):
        with pytest.raises(ValueError, match=message):
            use(x)


@SIZES
@pytest.mark.parametrize("name", ["block_rows", "block_cols", "index"])
def test_coordinates_with_gaps_between_them_are_refused_because_kernels_read_on(block_size, name):
    model, x = untrained(block_size), torch.randn(5, 16)
    topology = model[0].topology
    layout = topology.layout
    spaced = getattr(topology, name).repeat_interleave(2)[::2]
    rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1)
    setattr(topology, name, spaced)
    operator = torch.ops.sparsekern.dds
    tensors = layout._replace(**{name: spaced}).tensors
    for use in (
        model,
        lambda x: rule.step(),
        lambda x: operator(x, model[0].weight, None, None, *tensors, *layout.geometry, True),
    ):
        with pytest.raises(ValueError, match=rf"^Topology: {name} must be contiguous, got strides \(2,\)$"):
            use(x)
    setattr(topology, name, spaced.contiguous())
    assert_computes_its_weight(model, x)
    assert rule.step()


@SIZES
def test_compiled_code_follows_too(block_size):
    source, _, x = trained(block_size)
    target = untrained(block_size)
    compiled = torch.compile(target, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch.no_grad():
        for name, value in target.state_dict().items():
            value.copy_(source.state_dict()[name])
    torch.testing.assert_close(compiled(x), source(x), rtol=1e-4, atol=1e-5)


def test_unchanged_coordinates_cost_no_check(monkeypatch):
    from sparsekern import agreement

    model, _, x = trained(4)
    model(x)
    monkeypatch.setattr(agreement, "check_blocks", lambda *_: pytest.fail("checked again"))
    model(x).sum().backward()


# A rewire between forward and backward.

MODES = pytest.mark.parametrize("mode", ["eager", "autocast", "conv", "compiled"])


@MODES
@pytest.mark.parametrize("rewire", ["moved", "compacted"])
def test_a_backward_through_coordinates_of_another_time_is_refused(mode, rewire):
    block = 1 if mode == "conv" else 4
    layer = sk.SparseConv2d(4, 8, 3, density=0.3, block_size=1) if mode == "conv" else sk.SparseLinear(
        16, 24, density=0.5, block_size=block
    )  # fmt: skip
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(2, 4, 6, 6) if mode == "conv" else torch.randn(5, 16)
    rule = (
        sk.SET(model, optimizer, update_every=1)
        if rewire == "moved"
        else sk.GMP(model, optimizer, final_density=0.1, start_step=0, end_step=1, update_every=1)
    )
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if mode == "compiled" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = run(x)
    assert rule.step()
    # compiled code is torch's: its sentence is of the version of a saved tensor
    message = (
        "modified by an inplace operation" if mode == "compiled" else "rewired, pruned or loaded after the forward"
    )
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


# The registered operators, called directly.


def test_an_operator_refuses_a_layout_that_does_not_fit():
    topology = random_topology((3, 4), 4, live=0.5)
    rows, cols, index, *geometry = topology.layout
    x, weight = torch.randn(5, 16), torch.randn(topology.num_slots, 4, 4)
    good = (rows, cols, index)
    product = torch.ops.sparsekern.dds
    torch.testing.assert_close(
        product(x, weight, None, None, *(t.clone() for t in good), *geometry, True),
        product(x, weight, None, None, *good, *geometry, True),
    )
    bad = {
        "outside the": (rows + 20, cols, index),
        "must be of one length": (rows, cols[:-1], index),
        "want an index of": (rows, cols, index[:-1].clone()),
        "must be a tensor of integers": (rows.float(), cols, index),
    }
    for message, tensors in bad.items():
        with pytest.raises(ValueError, match=message):
            product(x, weight, None, None, *tensors, *geometry, True)
    junk = torch.randint(0, 2**31 - 1, index.shape, dtype=torch.int32)
    torch.testing.assert_close(
        product(x, weight, None, None, rows, cols, junk, *geometry, True),
        product(x, weight, None, None, *good, *geometry, True),
    )
    for operands, message in (
        ((x[:, :-1], weight, None, None), "x must be"),
        ((x, weight[:-1], None, None), "weight must be"),
        ((x, weight, torch.randn(3), None), "bias must be"),
        ((x, weight, None, torch.tensor([0, 5, 5])), "token_offsets must be"),
    ):
        with pytest.raises(ValueError, match=message):
            product(*operands, *good, *geometry, True)
    with pytest.raises(ValueError, match="dy must be"):
        torch.ops.sparsekern.sdd(x, x, None, *good, *geometry)
