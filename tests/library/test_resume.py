"""N steps equal k steps, a checkpoint, and N - k steps of new objects, bit for bit; also in another process."""

import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk

STEPS, EVERY = 16, 4

RULES = {
    "SET": partial(sk.SET, drop_fraction=0.23, update_every=EVERY, seed=5, coverage=True),
    "RigL": partial(sk.RigL, drop_fraction=sk.cosine(0.4), update_every=EVERY, end_step=14),
    "GMP": partial(sk.GMP, final_density=0.2, update_every=EVERY, end_step=14, scope="layer"),
    "GMP global": partial(sk.GMP, final_density=0.1, update_every=EVERY, end_step=14),
}


def build(kind, seed):
    """A model, its optimiser, a target network and a rule, on random topologies of this seed."""
    torch.manual_seed(seed)
    density = 1.0 if kind.startswith("GMP") else 0.3

    def make():
        heads = sk.SparseLinear(2 * 20, 2 * 9, density=density, block_size=1, groups=2)
        return nn.ModuleDict({"trunk": sk.SparseLinear(24, 40, density=density, block_size=4), "heads": heads})

    model, target = make(), make()
    target.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return model, target, optimizer, RULES[kind](model, optimizer, followers=[target])


def train(objects, start, stop):
    model, target, optimizer, rule = objects
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)  # the data of a step, whatever else was drawn before
        x = torch.randn(12, 24, generator=generator)
        optimizer.zero_grad()
        model["heads"](model["trunk"](x).relu()).square().mean().backward()
        optimizer.step()
        rule.step()
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 0.2)


def save(objects, path):
    torch.save([part.state_dict() for part in objects], path)


def load(kind, path):
    objects = build(kind, seed=99)
    for part, state in zip(objects, torch.load(path, weights_only=True), strict=True):
        part.load_state_dict(state)
    return objects


def result(objects):
    """Everything that must be equal, with the optimiser's state and the index."""
    model, target, optimizer, rule = objects
    parts = {"model": model.state_dict(), "target": target.state_dict(), "rule": rule.state_dict()}
    state = optimizer.state_dict()["state"]
    layout = [layer.topology.layout for net in (model, target) for layer in net.values()]
    return parts | {"state": state, "layout": layout, "stats": rule.stats()}


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


@pytest.mark.parametrize("kind", RULES)
def test_a_run_resumes_bit_for_bit_before_at_and_after_an_event(kind, tmp_path):
    whole = build(kind, seed=1)
    for step in range(STEPS):
        save(whole, tmp_path / f"{step}.pt")
        train(whole, step, step + 1)
    assert whole[3].events == (4 if kind == "SET" else 4 if kind.startswith("GMP") else 3)
    expected = result(whole)
    for stop in (0, EVERY - 1, EVERY, EVERY + 1, 3 * EVERY, STEPS - 1):
        torch.rand(stop), random.random()  # other use of the global generators must not matter
        resumed = load(kind, tmp_path / f"{stop}.pt")
        train(resumed, stop, STEPS)
        assert_equal(result(resumed), expected)


def test_a_run_resumes_bit_for_bit_in_another_process(tmp_path):
    expected = {}
    for kind in RULES:
        objects = build(kind, seed=1)
        train(objects, 0, EVERY - 1)
        save(objects, tmp_path / f"{kind}.pt")
        train(objects, EVERY - 1, STEPS)
        expected[kind] = objects
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment, timeout=120)
    for kind, objects in expected.items():
        resumed = load(kind, tmp_path / f"{kind} resumed.pt")
        assert_equal(result(resumed), result(objects))


@pytest.mark.parametrize("kind", RULES)
def test_the_state_of_other_layers_is_refused(kind):
    *_, rule = build(kind, seed=1)
    state = rule.state_dict()
    state["moved"]["tail"] = state["moved"].pop("heads")
    with pytest.raises(ValueError, match=r"\['tail', 'trunk'\], but the model has \['heads', 'trunk'\]"):
        rule.load_state_dict(state)


def test_a_store_that_was_left_for_the_sparse_path_is_left_when_it_is_resumed(monkeypatch):
    monkeypatch.setattr("sparsekern.choose.sparse_is_faster", lambda *_: True)

    def make():
        layer = sk.SparseLinear(16, 16, density=1.0, block_size=4)
        return layer, sk.GMP(
            layer, torch.optim.SGD(layer.parameters(), 0.1), 0.8, end_step=1, update_every=1, compact=False
        )

    (layer, rule), (resumed, again) = make(), make()
    rule.step()
    assert not layer.topology.full
    resumed.load_state_dict(layer.state_dict())
    again.load_state_dict(rule.state_dict())
    assert not resumed.topology.full and torch.equal(resumed.topology.index, layer.topology.index)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for kind in RULES:
        objects = load(kind, folder / f"{kind}.pt")
        train(objects, EVERY - 1, STEPS)
        save(objects, folder / f"{kind} resumed.pt")
