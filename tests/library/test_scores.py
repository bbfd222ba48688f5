"""Drop scores count weights only: neither padding nor dead slots, whatever stands there."""

import pytest
import torch
from oracle import random_topology
from torch import nn

import sparsekern as sk
from sparsekern.rewire.scores import block_l1


def padded_layer(padding=(3, 2), groups=1):
    topology = random_topology((3, 4), 4, groups, live=0.8, dead=2, padding=padding, seed=3)
    return sk.SparseLinear(*topology.shape[::-1], topology=topology)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [(3, 2), (0, 1), (0, 0)])
@pytest.mark.parametrize("junk", [7.0, float("nan"), float("inf")])
def test_drop_scores_ignore_padding_and_dead_slots(padding, groups, junk):
    layer = padded_layer(padding, groups)
    lanes = layer.lanes().expand_as(layer.weight)
    clean = torch.where(lanes, layer.weight.detach(), 0).double().abs().sum((1, 2))
    with torch.no_grad():
        layer.weight.copy_(torch.where(lanes, layer.weight, junk))
    torch.testing.assert_close(block_l1(layer).double(), clean)
    means = clean / lanes.sum((1, 2)).clamp(min=1)
    torch.testing.assert_close(block_l1(layer, mean=True).double(), means)


def test_weights_that_torch_initialised_are_dropped_by_what_they_mean():
    torch.manual_seed(1)
    model = nn.Sequential(sk.SparseLinear(20, 20, density=0.8, block_size=16))
    nn.init.normal_(model[0].weight)
    norms = (model[0].weight * model[0].lanes()).abs().sum((1, 2))
    assert norms.argmin() != model[0].weight.abs().sum((1, 2)).argmin()
    weakest = tuple(int(c[norms.argmin()]) for c in model[0].topology.layout[:2])
    rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), drop_fraction=0.34, update_every=1)
    rule.step()
    assert rule.stats()["0"]["dropped"] == 1 and not model[0].topology.mask()[0][weakest]


@pytest.mark.parametrize("make", [sk.SET, lambda *a, **k: sk.GMP(*a, end_step=2, final_density=0.3, **k)])
def test_nan_in_padding_is_no_nan_weight(recwarn, make):
    layer = padded_layer()
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.lanes(), float("nan"))
    rule = make(layer, torch.optim.SGD(layer.parameters(), 0.1), update_every=1)
    assert rule.step()
    rule.stats()
    assert not [w for w in recwarn if "NaN" in str(w.message)]


def test_gmp_compares_layers_by_the_mean_of_their_weights_only():
    model = nn.Sequential(
        sk.SparseLinear(17, 17, density=1.0, block_size=16), sk.SparseLinear(32, 32, density=1.0, block_size=16)
    )
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # in the padding too
        model[1].weight.fill_(1.1)
    rule = sk.GMP(model, torch.optim.SGD(model.parameters(), 0.1), end_step=1, update_every=1, final_density=0.5)
    rule.step()
    assert [layer.topology.num_live for layer in model] == [0, 4]
