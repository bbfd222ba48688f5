import copy
import io
import pickle

import numpy as np
import oracle
import pytest
import torch
from oracle import random_topology
from torch import nn

import sparsekern as sk


def make(live=0.3, block_size=4, groups=2, padding=(1, 2), seed=0, dead=0, **arguments):
    topology = random_topology((5, 6), block_size, groups, live, dead, padding, seed)
    out, into = topology.shape
    return sk.SparseLinear(into, out, topology=topology, **arguments)


def real_lanes(topology) -> np.ndarray:
    """1 for the elements of [num_slots, B, B] that stand for a weight, 0 for padding and dead slots."""
    shape = (topology.groups, *(size // topology.groups for size in topology.shape))
    return oracle.gather_blocks(np.ones(shape), topology)


@pytest.mark.parametrize("block_size", [1, 4])
def test_initial_values_are_uniform_within_the_real_fan_in_of_each_row(block_size):
    torch.manual_seed(1)
    layer = make(0.4, block_size, padding=(0, min(1, block_size - 1)), dead=2)
    dense = oracle.dense_weight(layer.weight, layer.topology)
    ones = torch.from_numpy(real_lanes(layer.topology))
    fan_in = oracle.dense_weight(ones, layer.topology).sum(2)
    assert len(np.unique(fan_in)) > 2
    draws = []
    for _ in range(300):
        layer.reset_parameters()
        dense = oracle.dense_weight(layer.weight, layer.topology)
        scaled = dense * np.sqrt(fan_in)[:, :, None]
        assert np.abs(scaled).max() <= 1 + 1e-6
        draws.append((scaled**2).sum(2) / np.maximum(fan_in, 1))
        bias = layer.bias.detach().double().numpy().reshape(fan_in.shape)
        bound = np.where(fan_in > 0, np.maximum(fan_in, 1), layer.in_features // layer.groups) ** -0.5
        assert np.abs(bias / bound).max() <= 1 + 1e-6
    variance = np.mean(draws, axis=0)[fan_in > 0]
    assert np.abs(variance - 1 / 3).max() < 5 * np.sqrt(4 / 45 / 300)  # the variance of u² is 4 / 45


def test_signals_keep_their_size_through_rows_of_unequal_fan_in():
    layer = sk.SparseLinear(512, 512, density=0.05, block_size=8, bias=False)
    y = layer(torch.randn(1000, 512)) * 3**0.5  # nn.Linear's init has variance 1 / (3 fan_in)
    assert (y.var(0).log2().abs() < 1).float().mean() > 0.99


def test_padding_and_dead_slots_stay_zero_in_weight_gradient_and_adam_state():
    layer = make(dead=2)
    lanes = real_lanes(layer.topology)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1, amsgrad=True)
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(9, layer.in_features)).square().sum().backward()
        optimizer.step()
    state = [value for value in optimizer.state[layer.weight].values() if value.shape == layer.weight.shape]
    assert len(state) == 3
    for tensor in (layer.weight, layer.weight.grad, *state):
        assert ((tensor.detach().numpy() != 0) == lanes).all()


def test_the_norm_of_the_gradients_is_that_of_the_masked_dense_layer():
    layer = make()
    x, dy = torch.randn(9, layer.in_features), torch.randn(9, layer.out_features)
    layer(x).backward(dy)
    groups = layer.groups
    full = oracle.outer(dy.double().numpy(), x.double().numpy(), groups)
    ones = oracle.dense_weight(torch.from_numpy(real_lanes(layer.topology)), layer.topology)
    expected = np.sqrt(((full * ones) ** 2).sum())
    assert nn.utils.get_total_norm([layer.weight.grad]).item() == pytest.approx(expected, rel=1e-6)


def test_to_dense_scatters_the_blocks():
    layer = make(dead=1)
    blocks = oracle.dense_weight(layer.weight, layer.topology)
    expected = torch.block_diag(*torch.from_numpy(blocks).float())
    assert torch.equal(layer.to_dense(), expected)


def test_a_checkpoint_brings_its_topology_and_slot_count_into_the_same_parameter():
    layer, saved = make(0.3, seed=1), make(0.7, seed=2, dead=3)
    ids = [id(p) for p in layer.parameters()]
    layer(torch.randn(2, layer.in_features)).sum().backward()
    layer.load_state_dict(copy.deepcopy(saved.state_dict()))
    x = torch.randn(7, layer.in_features)
    assert [id(p) for p in layer.parameters()] == ids
    assert torch.equal(layer.weight, saved.weight) and torch.equal(layer.topology.index, saved.topology.index)
    assert torch.equal(layer(x), saved(x))
    layer(x).sum().backward()
    assert layer.weight.grad.shape == saved.weight.shape
    with torch.no_grad():
        layer.weight.zero_()
    assert saved.weight.any(), "the checkpoint's memory must not be shared"


def test_a_checkpoint_survives_a_file_without_arbitrary_code():
    layer, other = make(seed=1), make(0.6, seed=2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.to_dense(), layer.to_dense())


def test_the_keys_of_a_checkpoint_are_stable():
    keys = ["weight", "bias", "topology.block_rows", "topology.block_cols", "topology._extra_state"]
    assert list(make().state_dict()) == keys


def test_loading_counts_the_adoptions_of_another_topology():
    layer, other = make(seed=1), make(seed=2)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert layer.topology.adoptions == 0
    layer.load_state_dict(other.state_dict())
    assert layer.topology.adoptions == 1


def dense_checkpoint():
    return nn.Linear(44, 38).state_dict()


def checkpoint_with_a_block_out_of_range():
    state = copy.deepcopy(make(0.6).state_dict())
    state["topology.block_rows"][0] = 99
    return state


def checkpoint_of_another_number_of_blocks_without_topology():
    return {name: t for name, t in make(0.6).state_dict().items() if not name.startswith("topology")}


def checkpoint_with_a_slot_too_many():
    state = make(0.6).state_dict()
    state["weight"] = torch.cat((state["weight"], state["weight"][:1]))
    return state


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (lambda: make(0.6, padding=(0, 2)).state_dict(), r"\(40, 44, 4, 2\), the layer \(38, 44, 4, 2\)"),
        (lambda: make(0.6, groups=1).state_dict(), r"\(19, 22, 4, 1\), the layer \(38, 44, 4, 2\)"),
        (lambda: make(0.6, block_size=8).state_dict(), r"\(num_slots, 4, 4\).*\(\d+, 8, 8\)"),
        (dense_checkpoint, r"\(num_slots, 4, 4\).*\(38, 44\).*from_linear"),
        (checkpoint_with_a_block_out_of_range, r"slot 0 has block \(99"),
        (checkpoint_with_a_slot_too_many, "34 slots, its topology 33"),
        (checkpoint_of_another_number_of_blocks_without_topology, "weight"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_layer_stays_usable(checkpoint, message, inside):
    layer = make(0.3, seed=3)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(3, layer.in_features)
    model, state = layer, checkpoint()
    if inside:
        model, state = nn.Sequential(layer), {f"0.{name}": value for name, value in state.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_state_dict(state)
    assert layer.weight.shape == before["weight"].shape
    assert torch.equal(layer.topology.block_rows, before["topology.block_rows"])
    assert layer(x).isfinite().all()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "double": lambda layer: copy.deepcopy(layer).double().float(),
    "share_memory": lambda layer: copy.deepcopy(layer).share_memory(),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same_and_share_nothing(way):
    layer = make(dead=1)
    twin = COPIES[way](layer)
    x = torch.randn(4, layer.in_features)
    assert torch.equal(twin(x), layer(x))
    for ours, theirs in zip(
        layer.state_dict(keep_vars=True).values(), twin.state_dict(keep_vars=True).values(), strict=True
    ):
        assert ours.data_ptr() != theirs.data_ptr()
    oracle.rewire_at_random(twin.topology, 0)
    assert not torch.equal(twin.topology.mask(), layer.topology.mask())


def test_two_layers_made_from_one_topology_rewire_apart():
    topology = random_topology((4, 4), 4)
    first, second = (sk.SparseLinear(16, 16, topology=topology) for _ in range(2))
    before = topology.mask()
    oracle.rewire_at_random(first.topology, 1)
    assert not torch.equal(first.topology.mask(), before)
    assert torch.equal(second.topology.mask(), before) and torch.equal(topology.mask(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_a_layer_leaves_its_topology_alone(dtype):
    layer = make()
    before = {name: (buffer.dtype, buffer.clone()) for name, buffer in layer.topology.named_buffers()}
    x = torch.randn(3, layer.in_features).to(dtype)
    y = layer.to(dtype)(x)
    assert y.dtype == dtype and layer.weight.dtype == dtype
    for name, buffer in layer.topology.named_buffers():
        assert buffer.dtype == before[name][0] and torch.equal(buffer, before[name][1])


def test_a_layer_may_be_made_on_the_meta_device_and_filled_from_a_checkpoint():
    saved = make()
    with torch.device("meta"):
        layer = sk.SparseLinear(saved.in_features, saved.out_features, density=0.3, block_size=4, groups=2)
    assert layer(torch.empty(3, layer.in_features, device="meta")).shape == (3, layer.out_features)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(saved.state_dict())
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), saved(x))


def test_a_topology_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(16, 8\)"):
        sk.SparseLinear(8, 16, topology=random_topology((4, 4), 4))
