"""What `sparsekern._cuda` says of many objects in one call: whether they are the same, how often they were written."""

import copy
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.agreement import stamp
from sparsekern.rewire.watch import SeenTensors, watch
from sparsekern.topology import Topology

_cuda = pytest.importorskip("sparsekern._cuda", reason="sparsekern was installed without sparsekern._cuda")
ROOT = Path(__file__).parent.parent.parent


def two_layers():
    return nn.Sequential(sk.SparseLinear(24, 32, density=0.5, block_size=4), sk.SparseLinear(32, 8, density=0.3))


class Watched:
    """Two layers, a follower and an optimiser that has trained, under watch."""

    def __init__(self, make_optimizer=torch.optim.Adam):
        self.model = two_layers()
        self.follower = copy.deepcopy(self.model)
        self.optimizer = make_optimizer(self.model.parameters())
        self.train()
        self.watch = watch(zip(self.model, self.follower, strict=True), [self.optimizer])

    def train(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(3, 24)).square().sum().backward()
        self.optimizer.step()

    @property
    def weight(self):
        return self.model[0].weight

    @property
    def state(self):
        return self.optimizer.state[self.weight]

    def renew_memory(self, tensor):
        tensor.data = tensor.data.clone()

    def renew_topology(self):
        topology = self.model[0].topology
        topology.replace(topology.block_rows.clone(), topology.block_cols.clone())

    def compact(self):
        kept = torch.arange(5)
        self.model[0].topology.keep_slots(kept)
        with torch.no_grad():
            self.weight.set_(self.weight[kept])

    def load_another(self):
        torch.manual_seed(9)
        self.model.load_state_dict(two_layers().state_dict())


CHANGES = {
    "a parameter's memory": lambda w: w.renew_memory(w.weight),
    "a part of a parameter's memory": lambda w: setattr(w.weight, "data", w.weight.data[:-1]),
    "a parameter": lambda w: setattr(w.model[0], "weight", nn.Parameter(w.weight.detach().clone())),
    "a parameter of the optimiser": lambda w: w.optimizer.param_groups[0]["params"].reverse(),
    "a follower's memory": lambda w: w.renew_memory(w.follower[1].weight),
    "the state's memory": lambda w: w.renew_memory(w.state["exp_avg"]),
    "a tensor of the state": lambda w: w.state.update(exp_avg=w.state["exp_avg"].clone()),
    "the state of a parameter": lambda w: w.optimizer.state.update({w.weight: dict(w.state)}),
    "the state of a parameter by none": lambda w: w.optimizer.state.pop(w.weight),
    "the state's entries": lambda w: w.state.update(max_exp_avg_sq=torch.zeros_like(w.weight)),
    "the state by load_state_dict": lambda w: w.optimizer.load_state_dict(copy.deepcopy(w.optimizer.state_dict())),
    "the dtype": lambda w: w.model.to(torch.bfloat16),
    "the device": lambda w: w.model.to("meta"),
    "the blocks by load_state_dict": Watched.load_another,
    "the coordinates' memory": lambda w: w.renew_memory(w.model[0].topology.block_rows),
    "the coordinates by a store of as many": Watched.renew_topology,
    "the store by a smaller one": Watched.compact,
    "the topology": lambda w: setattr(w.model[0], "topology", copy.deepcopy(w.model[0].topology)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_replaced_is_noticed(what):
    watched = Watched()
    assert watched.watch.holds()
    CHANGES[what](watched)
    assert not watched.watch.holds()


@pytest.mark.parametrize(
    "make_optimizer", [torch.optim.Adam, torch.optim.NAdam, partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_training_and_rewiring_replace_nothing(make_optimizer):
    watched = Watched(make_optimizer)
    rule = sk.SET(watched.model, watched.optimizer, update_every=1, followers=[watched.follower])
    for _ in range(3):
        watched.train()
        assert rule.step() and watched.watch.holds() and rule._watch is not None


def test_a_momentum_that_comes_later_is_noticed():
    watched = Watched(partial(torch.optim.SGD, lr=0.1))
    assert watched.watch.holds()
    watched.optimizer.param_groups[0]["momentum"] = 0.9
    watched.train()
    assert not watched.watch.holds()


def test_numbers_may_be_others_but_not_of_another_kind():
    watched = Watched()
    watched.state["count"] = 3
    held = watch(zip(watched.model, watched.follower, strict=True), [watched.optimizer])
    watched.state["count"] = 40_000
    assert held.holds()
    watched.state["count"] = torch.zeros_like(watched.weight)
    assert not held.holds()


def test_a_learning_rate_that_fresh_state_depends_on_is_noticed():
    for make_optimizer, holds in ((torch.optim.Rprop, False), (torch.optim.Adam, True)):
        watched = Watched(make_optimizer)
        watched.optimizer.param_groups[0]["lr"] = 0.125
        assert watched.watch.holds() is holds


def test_state_that_may_change_unseen_is_not_watched():
    watched = Watched()
    watched.state["history"] = [1.0]
    assert watch(zip(watched.model, watched.follower, strict=True), [watched.optimizer]) is None


def test_growth_scores_are_known_again_only_as_they_were():
    tables = [torch.zeros(1, 3, 4), None]
    seen = SeenTensors(tables)
    assert seen.are([tables[0].fill_(2), None])
    assert not seen.are([tables[0].clone(), None]) and not seen.are([tables[0], tables[0]])
    tables[0].data = torch.zeros(1, 4, 3)
    assert not seen.are(tables)
    tables[0] = None  # nobody holds it any more
    assert not seen.are(tables)


def layouts():
    made = [Topology.random((32, 32), 0.5, size).layout for size in (1, 4)]
    with torch.inference_mode():
        made.append(Topology.random((32, 32), 0.5, 8).layout)
    made[0].index.add_(0)
    made[1].block_rows.add_(0)
    return made


def test_versions_of_all_layouts_are_those_of_each():
    made = layouts()
    assert _cuda.versions(layouts=made) == tuple(n for layout in made for n in layout.versions())
    assert _cuda.versions(layouts=made)[-3:] == (-1, -1, -1)


def test_a_stamp_of_all_layouts_is_that_of_each():
    ours, theirs = layouts(), layouts()
    assert _cuda.stamp(layouts=ours) == tuple(n for layout in ours for n in layout.versions())
    for own, other in zip(ours, theirs, strict=True):
        stamp(other)
        assert vars(own.index).keys() == vars(other.index).keys()
        rows, cols, versions = own.index.built_from
        assert rows is own.block_rows and cols is own.block_cols
        assert versions == other.index.built_from[2] == own.versions()
        assert own.index.built_for == other.index.built_for


def test_the_structures_of_dlpack_are_those_that_torch_has(tmp_path):
    header = Path(torch.__path__[0], "include", "ATen", "dlpack.h")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or not header.exists():
        pytest.skip("a C++ compiler or torch's dlpack.h is missing")
    places = {
        ("TensorView", "DLTensor"): {
            "data": "data", "device_type": "device.device_type", "device": "device.device_id", "num_axes": "ndim",
            "kind": "dtype.code", "bits": "dtype.bits", "lanes": "dtype.lanes", "shape": "shape", "strides": "strides",
            "byte_offset": "byte_offset",
        },
        ("TensorExchange", "DLPackExchangeAPI"): {
            "major": "header.version.major", "minor": "header.version.minor", "earlier": "header.prev_api",
            "view": "dltensor_from_py_object_no_sync", "current_stream": "current_work_stream",
        },
    }  # fmt: skip
    lines = ["#include <cstddef>", f'#include "{header}"', f'#include "{ROOT}/csrc/cuda/dlpack.h"']
    for (own, other), fields in places.items():
        lines.append(f"static_assert(sizeof(sparsekern::{own}) == sizeof({other}));")
        for name, theirs in fields.items():
            lines.append(f"static_assert(offsetof(sparsekern::{own}, {name}) == offsetof({other}, {theirs}));")
    lines += [f"static_assert(sparsekern::TensorView::{n.upper()} == kDL{n});" for n in ("Float", "Bfloat")]
    source = tmp_path / "same.cpp"
    source.write_text("\n".join(lines))
    subprocess.run([compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", source], check=True)
