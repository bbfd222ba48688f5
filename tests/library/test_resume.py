"""N steps equal k steps, a checkpoint, and N - k steps of new objects, bit for bit; also in another process."""

import copy
import os
import pickle
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


HUGE, BEYOND_FLOATS = 2**63, 10**400
TAMPERED = {
    "a clock beyond all floats": ("SET", {"clock": BEYOND_FLOATS}, "clock must be a finite number, got 10"),
    "a clock at the end of floats": (
        "SET",
        {"clock": 1e308},
        f"clock must be a number from 0 to {HUGE - 1}, got 1e.?308",
    ),
    "a clock before the start": ("GMP", {"clock": -1.0}, f"clock must be a number from 0 to {HUGE - 1}, got -1.0"),
    "an infinite clock": ("RigL", {"clock": float("inf")}, "clock must be a finite number, got inf"),
    "events beyond 64 bits": ("SET", {"events": HUGE}, f"events must be an integer from 0 to {HUGE - 1}, got {HUGE}"),
    "a true number of events": ("RigL", {"events": True}, "events must be an integer from 0 to .*, got True"),
    "no next event": ("SET", {"next": 0}, f"next must be an integer from 1 to {HUGE - 1}, got 0"),
    "a next event beyond all floats": ("GMP", {"next": BEYOND_FLOATS}, "next must be an integer from 1 to .*, got 10"),
    "fewer than no blocks moved": (
        "SET",
        {"moved": {"trunk": (0, -1), "heads": (0, 0)}},
        "moved of layer 'trunk' must be an integer from 0 to .*, got -1",
    ),
    "moved, not a number": (
        "RigL",
        {"moved": {"trunk": (0, 0), "heads": (float("nan"), 0)}},
        "moved of layer 'heads' must be an integer from 0 to .*, got nan",
    ),
    "moved in layers of all names": (
        "SET",
        {"moved": {"trunk": (0, 0), 1: (0, 0)}},
        r"the state is for layers .'1', 'trunk'., but",
    ),
    "a block that is carried whole": (
        "SET",
        {"carry": {"trunk": [2.0], "heads": [0, 0]}},
        "carry of layer 'trunk' must be a number from -1e-09 to 1, got 2.0",
    ),
    "carried beyond all integers": (
        "RigL",
        {"carry": {"trunk": [0.5], "heads": [0, 1e300]}},
        "carry of layer 'heads' must be a number from -1e-09 to 1, got 1e.?300",
    ),
    "less than nothing carried": (
        "SET",
        {"carry": {"trunk": [-1.0], "heads": [0, 0]}},
        "carry of layer 'trunk' must be a number from -1e-09 to 1, got -1.0",
    ),
    "carried for too few groups": ("SET", {"carry": {"trunk": [0], "heads": [0]}}, "carry of layer 'heads' must be 2"),
    "more blocks at first than there are places": (
        "GMP",
        {"initial": {"trunk": [61], "heads": [180, 180]}},
        "initial of layer 'trunk' must be an integer from 0 to 60, got 61",
    ),
    "blocks at first beyond 64 bits": (
        "GMP global",
        {"initial": {"trunk": [60], "heads": [180, BEYOND_FLOATS]}},
        "initial of layer 'heads' must be an integer from 0 to 180, got 10",
    ),
    "half a block at first": (
        "GMP",
        {"initial": {"trunk": [59.5], "heads": [180, 180]}},
        "initial of layer 'trunk' must be an integer from 0 to 60, got 59.5",
    ),
    "compactions beyond 64 bits": ("GMP", {"compactions": HUGE}, "compactions must be an integer from 0 to .*, got 9"),
    "a text of whether it is done": ("GMP", {"done": "no"}, "done must be True or False, got 'no'"),
    "a number of whether it is armed": ("RigL", {"armed": 1}, "armed must be True or False, got 1"),
    "covered without values": (
        "SET",
        lambda state: {"covered": {path: mask.to("meta") for path, mask in state["covered"].items()}},
        "covered of layer 'trunk' must be dense and have values, got torch.strided on meta",
    ),
    "a sparse covered": (
        "SET",
        lambda state: {"covered": {path: mask.to_sparse() for path, mask in state["covered"].items()}},
        "covered of layer 'trunk' must be dense and have values, got torch.sparse_coo on cpu",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_state_is_refused_and_the_rule_goes_on_as_if_nobody_had_tried(case):
    kind, change, message = TAMPERED[case]
    objects, untouched = (build(kind, seed=1) for _ in range(2))
    for one in (objects, untouched):
        train(one, 0, EVERY + 1)
    state = copy.deepcopy(objects[3].state_dict())
    state |= change(state) if callable(change) else change
    name = kind.removesuffix(" global")
    with pytest.raises(ValueError, match=rf"^{name}.load_state_dict: {message}"):
        objects[3].load_state_dict(state)
    assert_equal(result(objects), result(untouched))
    for one in (objects, untouched):
        train(one, EVERY + 1, 2 * EVERY)
    assert_equal(result(objects), result(untouched))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["module", "compiled"])
def test_a_state_goes_between_a_model_and_its_wrapper(kind, wrap):
    model, target, optimizer, rule = objects = build(kind, 0)
    train(objects, 0, STEPS // 2)
    wrapped = RULES[kind](wrap(model), optimizer, followers=[target])
    assert next(iter(wrapped.layers)) != next(iter(rule.layers))
    wrapped.load_state_dict(rule.state_dict())
    bare = RULES[kind](model, optimizer, followers=[target])
    bare.load_state_dict(wrapped.state_dict())
    found, expected = bare.state_dict(), rule.state_dict()
    assert found.keys() == expected.keys() and found["events"] > 0
    for name in found.keys() - {"covered"}:
        assert found[name] == expected[name], name
    for name, mask in expected.get("covered", {}).items():
        assert torch.equal(found["covered"][name], mask)


@pytest.mark.parametrize(("every", "expected"), [(50, [250, 300, 350]), (5, [205, 210, 215])])
def test_a_resumed_rule_keeps_the_times_that_it_is_given_now(every, expected):
    def rule(update_every):
        return sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), update_every=update_every)

    model = nn.Sequential(sk.SparseLinear(32, 32, density=0.4, block_size=4))
    first = rule(10)
    for _ in range(200):
        first.step()
    resumed = rule(every)
    resumed.load_state_dict(first.state_dict())
    fired = [step for step in range(201, 400) if resumed.step()]
    assert fired[-3:] == [f for f in range(201, 400) if f % every == 0][-3:]
    assert [f for f in fired if f % every == 0][:3] == expected
    assert len([f for f in fired if f % every]) <= 1  # what counts as due may have waited


def test_a_state_that_was_loaded_is_the_rules_own():
    first, second = (build("SET", seed=1) for _ in range(2))
    train(first, 0, EVERY - 1)
    state = copy.deepcopy(first[3].state_dict())
    second[3].load_state_dict(first[3].state_dict())
    train(second, 0, 1)
    assert second[3].events == 1 and second[3].stats() != first[3].stats()
    assert_equal(first[3].state_dict(), state)


@pytest.mark.parametrize("kind", ["SET", "RigL"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_of_a_whole_run_takes_back_an_earlier_state(kind, duplicate):
    run = build(kind, seed=1)
    train(run, 0, EVERY)
    copied = duplicate(run)
    train(copied, EVERY, 3 * EVERY)
    for part, earlier in zip(copied, run, strict=True):
        part.load_state_dict(copy.deepcopy(earlier.state_dict()))
    for one in (copied, run):
        train(one, EVERY, 3 * EVERY)
    assert_equal(result(copied), result(run))


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
