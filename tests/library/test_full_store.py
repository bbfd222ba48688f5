"""A full store is the dense matrix: it costs what dense costs, and its coordinates follow from its shape."""

import copy
import io

import pytest
import torch
from oracle import dense_weight
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.rewire.select import all_candidates, places_in_rows

BLOCK_SIZES = pytest.mark.parametrize("block_size", [1, 4, 16])


@pytest.fixture
def dense_is_faster(monkeypatch):
    """Whatever this machine is: GMP leaves a full store where the sparse kernels are faster."""
    monkeypatch.setattr("sparsekern.choose.sparse_is_faster", lambda *_: False)


def full_layer(block_size, groups=1):
    return sk.SparseLinear(64 * groups, 48 * groups, density=1.0, block_size=block_size, groups=groups)


def train(model, optimizer, tokens=4):
    optimizer.zero_grad()
    model(torch.randn(tokens, 64)).square().mean().backward()
    optimizer.step()


def storages(value, seen):
    """Bytes of the memory behind all tensors in an object's attributes, and in its modules, lists and gradients."""
    if isinstance(value, Tensor):
        memory = value.untyped_storage()
        own = {} if memory.data_ptr() in seen else {memory.data_ptr(): memory.nbytes()}
        seen |= own
        inside = (value.grad, *vars(value).values()) if value.is_leaf else ()
    elif isinstance(value, nn.Module):
        own, inside = {}, vars(value).values()
    else:
        own = {}
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(own.values()) + sum(storages(one, seen) for one in inside)


def bytes_of(*things):
    return storages(list(things), {0: 0})


def dense_twin(layer):
    return nn.Linear(*layer.topology.shape[::-1])


def prune(layer, slots, by_rule=True):
    """Make the first so many slots of a full store dead."""
    if not by_rule:
        with torch.no_grad():
            layer.topology.block_rows[:slots] = layer.topology.block_cols[:slots] = -1
            layer.weight[:slots] = 0
        return
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:slots] = 1e-3
    share = 1 - slots / layer.topology.num_blocks
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    assert sk.GMP(layer, optimizer, share, end_step=1, update_every=1, compact=False).step()


@BLOCK_SIZES
def test_a_full_layer_takes_the_bytes_of_a_dense_one(block_size):
    layer = full_layer(block_size)
    (line,) = sk.summary(layer).layers
    assert line.bytes.total <= 1.01 * line.bytes.dense
    assert bytes_of(layer) <= 1.01 * bytes_of(dense_twin(layer))


@BLOCK_SIZES
@pytest.mark.parametrize(
    "move",
    [
        copy.deepcopy,
        lambda layer: layer.to("meta").to_empty(device="cpu"),
        lambda layer: layer.double().float(),
        lambda layer: (layer.load_state_dict(copy.deepcopy(layer.state_dict())), layer)[1],
        lambda layer: (layer.load_state_dict(full_layer(layer.block_size).state_dict(), assign=True), layer)[1],
        lambda layer: (layer.set_density(0.3), layer.set_density(1.0), layer)[2],
        lambda layer: sk.load(nn.Sequential(dense_twin(layer)), nn.Sequential(layer).state_dict())[0],
    ],
    ids=["deepcopy", "meta", "dtype", "load", "assign", "density", "sk.load"],
)
def test_it_takes_no_more_when_it_was_moved_copied_or_loaded(block_size, move):
    layer = move(full_layer(block_size))
    layer(torch.randn(2, 64))
    assert layer.topology.full and layer.topology.nbytes == 0
    assert bytes_of(layer) <= 1.01 * bytes_of(dense_twin(layer))


@BLOCK_SIZES
def test_gradual_pruning_takes_the_bytes_of_dense_training_until_its_first_event(dense_is_faster, block_size):
    layer, follower = full_layer(block_size), full_layer(block_size)
    follower.load_state_dict(layer.state_dict())
    twin = dense_twin(layer)
    optimizer, other = (torch.optim.Adam(m.parameters()) for m in (layer, twin))
    rule = sk.GMP(layer, optimizer, 0.1, end_step=500, update_every=10, followers=[follower])
    for _ in range(9):
        train(layer, optimizer)
        train(twin, other)
        assert not rule.step()
    assert sk.summary(layer, optimizer).total.total <= 1.01 * sk.summary(twin, other).total.total
    states = [list(one.state.values()) for one in (optimizer, other)]
    assert bytes_of(layer, follower, states[0]) <= 1.01 * bytes_of(twin, dense_twin(layer), states[1])
    assert rule.step() and not rule.step()
    assert layer.topology.full and layer.topology.num_live < layer.topology.num_slots
    assert layer.topology.nbytes == -(-layer.topology.num_slots // 32) * 4  # a bit says of a slot that it is dead
    assert sk.summary(layer, optimizer).total.total <= 1.01 * sk.summary(twin, other).total.total


@BLOCK_SIZES
@pytest.mark.parametrize("groups", [1, 3])
def test_the_coordinates_of_a_full_store_follow_from_its_shape(block_size, groups):
    topology = full_layer(block_size, groups).topology
    rows, cols = (n // groups for n in topology.grid)
    blocks = [(g * rows + r, g * cols + c) for g in range(groups) for r in range(rows) for c in range(cols)]
    for name, expected in (("block_rows", [r for r, _ in blocks]), ("block_cols", [c for _, c in blocks])):
        assert getattr(topology, name).tolist() == expected and getattr(topology, name).dtype == torch.int16
    assert (topology.num_slots, topology.num_live, topology.density) == (len(blocks), len(blocks), 1.0)
    assert topology.live_per_group() == groups * [rows * cols] and topology.mask().all()


@BLOCK_SIZES
@pytest.mark.parametrize("by_rule", [True, False])
def test_dead_slots_of_a_full_store_are_stated(dense_is_faster, block_size, by_rule):
    layer = full_layer(block_size)
    prune(layer, 7, by_rule)
    topology = layer.topology
    assert topology.num_live == topology.num_slots - 7 and topology.full
    for coordinates in (topology.block_rows, topology.block_cols):
        assert (coordinates[:7] == -1).all() and (coordinates[7:] >= 0).all()
    assert topology.mask().sum() == topology.num_live and not topology.mask().view(-1)[:7].any()
    assert topology.live_per_group() == [topology.num_live]
    layer(torch.randn(5, 64)).sum().backward()
    assert not layer.weight.grad[:7].any() and layer.weight.grad[7:].any()
    for twin in (copy.deepcopy(layer), through_a_file(layer), full_layer(block_size)):
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin.topology.mask(), topology.mask()) and twin.topology.nbytes == topology.nbytes


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dead", [[], [2, 5]])
def test_a_checkpoint_with_the_coordinates_of_a_full_store_loads(dead):
    """As all were saved while a full store kept them."""
    rows, cols = torch.arange(12, dtype=torch.int16) // 4, torch.arange(12, dtype=torch.int16) % 4
    rows[dead], cols[dead] = -1, -1
    weight = torch.randn(12, 4, 4)
    weight[dead] = 0
    saved = {
        "weight": weight,
        "bias": torch.randn(12),
        "topology.block_rows": rows,
        "topology.block_cols": cols,
        "topology._extra_state": torch.tensor([12, 16, 4, 1, 1]),
    }
    made, fresh = sk.SparseLinear(16, 12, density=1.0, block_size=4), sk.SparseLinear(16, 12, density=0.3, block_size=4)
    loaded = sk.load(nn.Linear(16, 12), saved)
    for layer in (made, fresh, loaded):
        layer.load_state_dict(saved)
        assert layer.topology.full and layer.topology.nbytes == (4 if dead else 0)
        assert layer.topology.num_live == 12 - len(dead)
        again = layer.state_dict()
        assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)
        dense = weight.view(3, 4, 4, 4).transpose(1, 2).reshape(12, 16)
        assert torch.equal(layer.to_dense(), dense)


# Whoever looks at coordinates gets tensors of them. What is written into those is followed, as with any other store.


def test_coordinates_that_nobody_holds_any_more_take_no_memory():
    layer = full_layer(1)
    before = bytes_of(layer)
    layer.state_dict(), layer.topology.block_rows, layer.topology.block_cols  # noqa: B018
    layer(torch.randn(2, 64))
    assert bytes_of(layer) == before


def test_coordinates_of_a_full_store_are_written_through_a_reference_however_old():
    layer, x = full_layer(4), torch.randn(5, 64)
    rows, some_cols = layer.topology.block_rows, layer.topology.block_cols[3:]
    for _ in range(3):
        layer(x)
    rows[3], some_cols[0] = -1, -1
    assert layer.topology.mask().view(-1).tolist() == [slot != 3 for slot in range(192)]
    assert layer.topology.adoptions == 1 and layer.topology.full
    rows[4], some_cols[1] = 0, 3  # the place of the slot that is dead
    assert layer.topology.mask().view(-1).tolist() == [slot != 4 for slot in range(192)]
    assert layer.topology.adoptions == 2 and not layer.topology.full
    torch.testing.assert_close(layer(x), x @ layer.to_dense().t() + layer.bias)


def test_a_backward_through_a_full_store_that_was_pruned_since_is_refused():
    layer = full_layer(4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rule = sk.GMP(layer, optimizer, 0.1, end_step=20, update_every=1)
    for _ in range(2):  # the bits come with the first event, and are written at the second
        y = layer(torch.randn(2, 64))
        assert rule.step()
        with pytest.raises(RuntimeError, match="rewired, pruned or loaded after the forward"):
            y.sum().backward()


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_on_a_gpu_there_are_bits_for_dead_slots_before_there_are_any(monkeypatch, density):
    """A CUDA graph that is captured before the first event then reads them, also after a checkpoint was loaded."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    layer, follower = (sk.SparseLinear(64, 48, density=density, block_size=4) for _ in range(2))
    follower.load_state_dict(layer.state_dict())
    rule = sk.GMP(layer, torch.optim.SGD(layer.parameters(), 0.1), end_step=20, update_every=10, followers=[follower])
    for own in (layer, follower):
        own.load_state_dict(full_layer(4).state_dict())
    rule.step()
    for own in (layer, follower):
        assert own.topology.full and own.topology.nbytes == 192 / 8


@pytest.mark.parametrize("block_size", [1, 4])
def test_compiled_training_follows_the_dead_slots_of_a_full_store(dense_is_faster, block_size):
    layer = full_layer(block_size)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    rule = sk.GMP(layer, torch.optim.SGD(layer.parameters(), 0.1), 0.5, end_step=4, update_every=1, compact=False)
    for _ in range(3):
        assert rule.step()
        layer.zero_grad()
        compiled(torch.randn(5, 64)).sum().backward()
        dead = layer.topology.block_rows < 0
        assert layer.topology.full and dead.any() and not layer.weight.grad[dead].any()


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_full_store_with_dead_slots_grows_where_the_rule_says(dense_is_faster, block_size):
    layer = full_layer(block_size)
    prune(layer, 60)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rule = sk.SET(layer, optimizer, update_every=1)
    live = layer.topology.num_live
    assert rule.step()
    mask = layer.topology.mask().view(-1)
    assert mask.sum() == live and mask[:60].any() and not mask[60:].all()
    x = torch.randn(5, 64)
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    optimizer.step()
    weight = torch.from_numpy(dense_weight(layer.weight, layer.topology)[0]).float()
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL])
def test_balanced_growth_moves_nothing_in_a_full_store_without_dead_slots(kind):
    model = nn.Sequential(full_layer(4), sk.SparseLinear(48, 64, density=0.3, block_size=4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = kind(model, optimizer, update_every=1, balance="rows")
    before = model[1].topology.mask()
    train(model, optimizer)
    assert rule.step() and not torch.equal(model[1].topology.mask(), before)
    assert model[0].topology.full and model[0].topology.nbytes == 0 and model[0].topology.num_live == 192


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL])
@pytest.mark.parametrize("groups", [1, 2])
def test_balanced_growth_keeps_the_number_of_every_row_of_a_full_store_with_dead_slots(kind, groups):
    layer = full_layer(4, groups)
    prune(layer, 70, by_rule=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rule = kind(layer, optimizer, update_every=1, balance="rows")
    before = layer.topology.mask()
    optimizer.zero_grad()
    layer(torch.randn(4, 64 * groups)).square().mean().backward()
    optimizer.step()
    assert layer.topology.full and rule.step()
    assert torch.equal(layer.topology.mask().sum(2), before.sum(2)) and not torch.equal(layer.topology.mask(), before)


@BLOCK_SIZES
@pytest.mark.parametrize("groups", [1, 2])
def test_candidates_of_a_full_store_are_those_of_the_same_blocks_with_coordinates(block_size, groups):
    topology = full_layer(block_size, groups).topology
    dead = torch.rand(topology.num_slots) < 0.4
    topology.mark_dead(dead)
    scores = torch.randint(1000, (groups, topology.num_blocks // groups))
    slots = (~dead).nonzero().squeeze(1)[::3]
    found = []
    for layout in (topology.layout, topology.layout.indexed()):
        keys = all_candidates(layout, scores)
        found.append((keys, *places_in_rows(keys, layout, slots)))
    assert topology.full and (found[0][0].flatten() == -1).equal(~dead)
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_a_full_layer_beside_sparse_ones_keeps_no_coordinates_under_a_rule_that_moves_blocks():
    model = nn.Sequential(sk.SparseLinear(64, 64, density=0.2, block_size=1), full_layer(1))
    optimizer = torch.optim.Adam(model.parameters())
    rule = sk.RigL(model, optimizer, update_every=2, end_step=100)
    for _ in range(6):
        train(model, optimizer)
        rule.step()
    assert rule.events == 3 and model[1].topology.full and model[1].topology.nbytes == 0
    assert bytes_of(model[1].topology) == 0


@pytest.mark.parametrize(
    "share", [lambda rows: rows, lambda rows: rows[:5], lambda rows: rows.detach()], ids=["it", "view", "detached"]
)
def test_whatever_shares_the_memory_of_coordinates_that_were_shown_is_followed(share):
    layer = full_layer(4)
    rows, cols = share(layer.topology.block_rows), share(layer.topology.block_cols)
    for _ in range(3):
        layer(torch.randn(5, 64))
    rows[3] = cols[3] = -1
    assert layer.topology.num_live == layer.topology.num_slots - 1


def test_a_tensor_that_was_assigned_as_coordinates_is_followed_when_it_is_written_later():
    layer = full_layer(4)
    rows = layer.topology.block_rows.clone()
    layer.topology.block_rows = rows
    for _ in range(3):
        layer(torch.randn(5, 64))
    rows[3] = layer.topology.block_cols[3] = -1
    assert layer.topology.mask().view(-1).tolist() == [slot != 3 for slot in range(192)]


def test_coordinates_that_are_written_over_with_themselves_move_no_memory(dense_is_faster):
    """A broadcast of a state_dict does it, perhaps while a CUDA graph has the address of the dead slots' bits."""
    layer = full_layer(4)
    prune(layer, 7)
    assert layer.topology.full
    index, adoptions = layer.topology.index.data_ptr(), layer.topology.adoptions
    for coordinates in (layer.topology.block_rows, layer.topology.block_cols):
        coordinates.copy_(coordinates.clone())
    y = layer(torch.randn(5, 64))
    assert (layer.topology.index.data_ptr(), layer.topology.adoptions) == (index, adoptions)
    y.sum().backward()
    assert not layer.weight.grad[:7].any() and layer.weight.grad[7:].any()


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("wrong", [[1, 2], None, torch.zeros(192)], ids=["list", "None", "float32"])
def test_what_is_no_tensor_of_integers_is_refused_as_coordinates_where_it_is_assigned(density, wrong):
    topology = sk.Topology.random((48, 64), density, 4)
    before = topology.mask()
    for name in ("block_rows", "block_cols"):
        with pytest.raises(ValueError, match=f"Topology: {name} must be a tensor of integers, got "):
            setattr(topology, name, wrong)
    assert torch.equal(topology.mask(), before)


def test_coordinates_that_were_shown_are_written_after_the_store_is_full_no_longer():
    layer = full_layer(4)
    rows, cols = layer.topology.block_rows, layer.topology.block_cols
    layer.topology.leave_full_store()
    rows[3] = cols[3] = -1
    assert layer.topology.mask().view(-1).tolist() == [slot != 3 for slot in range(192)]


def test_compiled_code_says_that_it_cannot_follow_coordinates_of_a_full_store():
    layer, x = full_layer(4), torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.topology.block_rows[3] = layer.topology.block_cols[3] = -1
    with pytest.raises(RuntimeError, match="coordinates of a full store were written in place"):
        compiled(x)
    layer(x)
    compiled(x).sum().backward()
    assert not layer.weight.grad[3].any() and layer.weight.grad[4].all()


@pytest.mark.parametrize("shape", [(4, 20), (20, 4), (4, 4)])
def test_coordinates_of_a_full_store_of_one_row_or_column_are_written_one_by_one(shape):
    layer = sk.SparseLinear(*shape, density=1.0, block_size=4)
    rows, cols = layer.topology.block_rows, layer.topology.block_cols
    rows[0] = cols[0] = -1
    assert layer.topology.mask().view(-1).tolist() == [slot != 0 for slot in range(layer.topology.num_slots)]


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("already", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.ones(1, dtype=torch.bool), r"torch.bool \(1,\)"),
        (torch.ones(11, dtype=torch.bool), r"torch.bool \(11,\)"),
        (torch.ones(13, dtype=torch.bool), r"torch.bool \(13,\)"),
        (torch.ones(12, 1, dtype=torch.bool), r"torch.bool \(12, 1\)"),
        (torch.ones(12), r"torch.float32 \(12,\)"),
        (12 * [True], "list"),
    ],
    ids=["one", "fewer", "more", "a column", "float32", "a list"],
)
def test_what_is_no_mask_of_the_slots_marks_none_dead(density, already, wrong, got):
    topology = sk.SparseLinear(64, 48 if density == 1 else 96, density=density, block_size=16).topology
    assert topology.num_slots == 12 and topology.full == (density == 1)
    if already:
        topology.mark_dead(torch.arange(12) < already)
    with pytest.raises(ValueError, match=rf"^mark_dead: dead must be boolean \(12,\), got {got}$"):
        topology.mark_dead(wrong)
    assert topology.num_live == 12 - already
