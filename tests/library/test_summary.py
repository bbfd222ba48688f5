"""summary: bytes of weight, gradient, optimiser state and index, measured and against dense."""

import pytest
import torch
from torch import nn

import sparsekern as sk


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, *shape: int) -> None:
    model(torch.randn(shape)).square().mean().backward()
    optimizer.step()


def test_every_byte_of_a_trained_layer_is_counted():
    layer = sk.SparseLinear(1024, 1024, density=0.1, block_size=16)
    optimizer = torch.optim.Adam(layer.parameters())
    trained(layer, optimizer, 4, 1024)
    (line,) = sk.summary(layer, optimizer).layers
    weight = 410 * 16 * 16 * 4
    assert (line.name, line.shape, line.block_size, line.live, line.num_blocks) == ("", (1024, 1024), 16, 410, 4096)
    assert (line.bytes.weight, line.bytes.gradient) == (weight, weight)
    assert line.bytes.state == 2 * weight + 4  # and the step count
    assert line.bytes.index == layer.topology.nbytes > 0
    assert line.bytes.total == 4 * weight + 4 + layer.topology.nbytes
    assert line.bytes.dense == 4 * 1024 * 1024 * 4 + 4
    assert line.bytes.total <= 1.05 * 0.1 * line.bytes.dense + line.bytes.index  # the promise


def test_the_index_of_block_size_one_costs_at_most_twelve_bytes_a_weight():
    layer = sk.SparseLinear(1024, 128, density=0.05, block_size=1)
    (line,) = sk.summary(layer).layers
    assert line.bytes.index <= 12 * line.live


def test_the_total_is_the_sum_of_all_tensors_of_model_and_optimiser():
    model = nn.Sequential(
        sk.SparseConv2d(3, 32, 3, density=0.5, block_size=4),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        sk.SparseLinear(32 * 16, 64, density=0.1, block_size=8),
        nn.Linear(64, 8),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rule = sk.RigL(model, optimizer)  # holds growth scores
    trained(model, optimizer, 2, 3, 6, 6)
    rule.step()
    parameters = list(model.parameters())
    tensors = parameters + [p.grad for p in parameters] + list(model.buffers())
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    scores = [model[i].growth.scores for i in (0, 3)]
    assert [s.nbytes > 0 for s in scores] == [True, True]
    index = sum(model[i].topology.nbytes for i in (0, 3)) + sum(s.nbytes for s in scores)
    total = sk.summary(model, optimizer).total
    assert total.total == sum(t.numel() * t.element_size() for t in tensors) + index


def test_bytes_follow_the_dtype():
    layer = sk.SparseLinear(64, 64, density=0.5, dtype=torch.bfloat16)
    (line,) = sk.summary(layer).layers
    assert line.bytes.weight == 8 * 256 * 2 and line.bytes.dense == 64 * 64 * 2


def test_slots_that_a_pruning_rule_left_dead_still_count():
    model = sk.SparseLinear(64, 64, density=1.0, block_size=16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = sk.GMP(model, optimizer, final_density=0.25, start_step=0, end_step=1, update_every=1, compact=False)
    trained(model, optimizer, 4, 64)
    rule.step()
    (line,) = sk.summary(model, optimizer).layers
    assert (line.live, line.num_blocks, line.density) == (4, 16, 0.25)
    assert line.bytes.weight == 64 * 64 * 4


def test_a_group_counts_no_element_outside_its_matrix():
    (line,) = sk.summary(sk.SparseLinear(64, 64, density=1.0, groups=4)).layers
    assert line.bytes.dense == 4 * 16 * 16 * 4 and line.groups == 4


def test_the_state_of_several_optimisers_is_counted():
    model = nn.Sequential(sk.SparseLinear(64, 64), sk.SparseLinear(64, 64))
    first, second = torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[1].parameters(), 0.1, momentum=0.9)
    trained(model, first, 2, 64)
    assert sk.summary(model, [first, second]).notes[-1].startswith("The optimiser does not hold state for every")
    second.step()
    summary = sk.summary(model, [first, second])
    weight = summary.layers[0].bytes.weight
    assert [line.bytes.state for line in summary.layers] == [2 * weight + 4, weight] and summary.notes == ()
    with pytest.raises(ValueError, match="summary: optimizer must be a torch optimiser, or a list, got str"):
        sk.summary(model, [first, "sgd"])


def test_what_is_not_allocated_yet_is_said():
    model = nn.Sequential(sk.SparseLinear(64, 64))
    optimizer = torch.optim.Adam(model.parameters())
    assert sk.summary(model).notes == (
        "Not every gradient is allocated: they are there between backward and zero_grad.",
        "No optimiser was given, so its state is not counted.",
    )
    assert sk.summary(model, optimizer).notes[1].startswith("The optimiser does not hold state for every parameter")
    trained(model, optimizer, 2, 64)
    assert sk.summary(model, optimizer).notes == ()
    optimizer.zero_grad()
    assert len(sk.summary(model, optimizer).notes) == 1


def test_the_table_is_aligned_and_ends_with_rest_and_total():
    model = nn.ModuleDict({"body": sk.SparseLinear(64, 64, density=0.25), "head": nn.Linear(64, 8)})
    text = str(sk.summary(model))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "block", "size"]
    assert lines[1].split()[:9] == ["body", "64", "x", "64", "16", "0.2500", "4", "16", "4,096"]
    assert lines[2].startswith("rest of the model") and lines[3].startswith("total")
    assert len({len(line) for line in lines[:4]}) == 1
    assert repr(sk.summary(model)) == text


@pytest.mark.parametrize("model", [nn.Linear(8, 8), nn.ReLU()])
def test_a_model_without_sparse_layers_has_only_a_rest(model):
    summary = sk.summary(model)
    assert summary.layers == () and summary.total == summary.rest
    assert summary.total.weight == sum(p.numel() * 4 for p in model.parameters())
    assert "total" in str(summary)
