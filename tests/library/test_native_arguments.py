"""What the native CPU module refuses by itself: tensors that it would read wrongly, or beyond their end."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.backends import cpu
from sparsekern.topology import Topology

_C = pytest.importorskip("sparsekern._C", reason=str(cpu.unavailable()))

ROOT = Path(__file__).parent.parent.parent
GROUPS, BLOCK, TOKENS, OUT, INTO = 2, 4, 6, 8, 12  # features of one group


def calls() -> dict[str, dict]:
    """A good call of every function, ragged where there is a choice."""
    topology = Topology.random((GROUPS * OUT, GROUPS * INTO), 0.5, BLOCK, GROUPS)
    weight, dense = torch.randn(topology.num_slots, BLOCK, BLOCK), torch.randn(GROUPS, OUT, INTO)
    x, dy, offsets = torch.randn(TOKENS, INTO), torch.randn(TOKENS, OUT), torch.tensor([0, 2, TOKENS])
    common = {"layout": topology.layout, "threads": 1}
    ragged = common | {"token_offsets": offsets}
    return {
        "dds": ragged | {"x": x, "weight": weight, "bias": torch.randn(GROUPS * OUT), "y": dy, "transpose": True},
        "sdd": ragged | {"dy": dy, "x": x, "grad": weight},
        "densify": common | {"weight": weight, "dense": dense},
        "gather": common | {"dense": dense, "weight": weight},
    }


def call(function: str, **changed) -> None:
    given = calls()[function] | changed
    names = inspect.signature(getattr(_C, function)).parameters
    getattr(_C, function)(**{name: given.pop(name) for name in names}, **given)


@pytest.mark.parametrize("function", calls())
def test_a_good_call_is_taken(function):
    call(function)
    call(function, layout=calls()[function]["layout"]._replace(full=False))


@pytest.mark.parametrize("function", ["dds", "sdd"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        *((torch.tensor([0, 2, 6]).to(d), "int32 or int64, got torch." + str(d)[6:]) for d in (
            torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.float32, torch.float64,
        )),
        (torch.tensor([0, 6]), "must have 3 elements, got 2"),
        (torch.tensor([0, 2, 4, 6]), "must have 3 elements, got 4"),
        (torch.tensor([0, 9, 2, 9, 6])[::2], "must be contiguous"),
        (torch.tensor([0, 2, 6], device="meta"), "must be on the CPU"),
        (torch.tensor([0, 2, 7]), "must rise from 0 to 6, the number of tokens"),
        (torch.tensor([0, 7, 6]), "must rise from 0 to 6"),
        (torch.tensor([-1, 2, 6]), "must rise from 0 to 6"),
    ],
)  # fmt: skip
def test_token_offsets_that_cannot_be_read_are_refused(function, offsets, message):
    with pytest.raises(ValueError, match=f"^{function}: token_offsets .*{message}"):
        call(function, token_offsets=offsets)


@pytest.mark.parametrize("function", calls())
@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("block_rows", lambda t: t.long(), "block_rows must be int16 or int32, got torch.int64"),
        ("block_rows", lambda t: t.float(), "block_rows must be int16 or int32, got torch.float32"),
        ("block_cols", lambda t: t.int(), "block_cols must be of block_rows' dtype, got torch.int32"),
        ("block_cols", lambda t: t[1:], "block_cols must have 6 elements, got 5"),
        ("block_rows", lambda t: t.to("meta"), "block_rows has no memory"),
        ("index", lambda t: t.long(), "index must be int32, got torch.int64"),
        ("index", lambda t: t[1:], "index must have 46 elements, got 45"),
        ("index", lambda t: t.to("meta"), "index has no memory"),
        ("block_size", lambda n: 3, "layout must have blocks of a power of two up to 128, got 3"),
        ("groups", lambda n: 0, "layout must have block rows and block columns that its groups share equally"),
        ("groups", lambda n: 3, "layout must have block rows and block columns that its groups share equally"),
        ("full", lambda full: True, "layout is no full store: it has coordinates of 6 slots"),
    ],
)
def test_layouts_that_cannot_be_read_are_refused(function, field, change, message):
    layout = calls()[function]["layout"]
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        call(function, layout=layout._replace(**{field: change(getattr(layout, field))}))


@pytest.mark.parametrize(
    ("function", "argument", "change", "message"),
    [
        ("dds", "x", lambda t: t.double(), "must be float32 or bfloat16, got torch.float64"),
        ("dds", "x", lambda t: t[:, 1:], r"must be of shape \(tokens, 12\), got \(6, 11\)"),
        ("dds", "x", lambda t: t.t().contiguous().t(), "must have rows whose elements lie side by side"),
        ("dds", "x", lambda t: t.flatten(), r"must be of shape \(tokens, 12\), got \(72,\)"),
        ("dds", "x", lambda t: t.to("meta"), "has no memory"),
        ("dds", "weight", lambda t: t.bfloat16(), "must be of the other operands' dtype, got torch.bfloat16"),
        ("dds", "weight", lambda t: t[1:], "must have 96 elements, got 80"),
        ("dds", "weight", lambda t: t.int(), "must be float32 or bfloat16, got torch.int32"),
        ("dds", "bias", lambda t: t[1:], "must have 16 elements, got 15"),
        ("dds", "y", lambda t: t[1:], "must have 48 elements, got 40"),
        ("dds", "threads", lambda n: 0, "must be at least 1, got 0"),
        ("dds", "x", lambda t: t.view(3, 24), r"must be of shape \(tokens, 12\), got \(3, 24\)"),
        ("sdd", "dy", lambda t: t[1:], r"must be of shape \(6, 8\), got \(5, 8\)"),
        ("sdd", "dy", lambda t: t.t().contiguous().t(), "must have rows whose elements lie side by side"),
        ("sdd", "grad", lambda t: t.bfloat16(), "must be of the other operands' dtype, got torch.bfloat16"),
        ("densify", "weight", lambda t: t.double(), "must be float32, bfloat16 or float16, got torch.float64"),
        ("densify", "dense", lambda t: t.half(), "must be torch.float32, got torch.float16"),
        ("densify", "dense", lambda t: t[:1], "must have 192 elements, got 96"),
        ("gather", "weight", lambda t: t[:1], "must have 96 elements, got 16"),
    ],
)
def test_operands_that_cannot_be_read_are_refused(function, argument, change, message):
    with pytest.raises(ValueError, match=f"^{function}: {argument} {message}"):
        call(function, **{argument: change(calls()[function][argument])})


def test_a_single_feature_may_have_any_stride():
    topology = Topology.random((3, 1), 1.0, 1)
    x, weight = torch.randn(5, 7)[:, 3:4].as_strided((5, 1), (7, 7)), torch.randn(3, 1, 1)
    torch.testing.assert_close(cpu.dds(x, weight, topology.layout, transpose=True), x * weight.view(3))


def test_calls_name_all_arguments():
    with pytest.raises(
        TypeError, match="dds takes these keywords, all of them in this order, and nothing else: layout, x"
    ):
        _C.dds()
    with pytest.raises(TypeError, match="sdd takes these keywords"):
        call("sdd", tokens=3)
    with pytest.raises(TypeError, match="densify takes these keywords"):
        _C.densify(**dict(reversed(calls()["densify"].items())))
    with pytest.raises(TypeError, match="gather takes these keywords"):
        _C.gather(*calls()["gather"].values())
    with pytest.raises(TypeError, match="layout must be a sparsekern.topology.Layout"):
        call("densify", layout=(1, 2, 3))


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("ids", lambda t: t.int(), "ids must be int64, got torch.int32"),
        ("ids", lambda t: t[:2], "order must have 2 elements, got 6"),
        ("ids", lambda t: t.repeat_interleave(2)[::2], "ids must be contiguous"),
        ("offsets", lambda t: t[:0], r"offsets must have groups \+ 1 elements, got 0"),
        ("order", lambda t: t[1:], "order must have 6 elements, got 5"),
        ("inverse", lambda t: t.float(), "inverse must be int64, got torch.float32"),
    ],
)
def test_token_orders_that_cannot_be_written_are_refused(argument, change, message):
    given = {"ids": torch.tensor([1, 0, 1, 0, 1, 1]), "offsets": torch.empty(3).long()}
    given |= {"order": torch.empty(6).long(), "inverse": torch.empty(6).long()}
    assert _C.order_by_group(**given) is True
    assert given["offsets"].tolist() == [0, 2, 6] and given["order"].tolist() == [1, 3, 0, 2, 4, 5]
    assert given["inverse"].tolist() == [2, 0, 3, 1, 4, 5]
    with pytest.raises(ValueError, match=f"^order_by_group: {message}"):
        _C.order_by_group(**given | {argument: change(given[argument])})


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("_C", "_C.order_by_group(ids=zeros(3), offsets=zeros(2), order=zeros(3), inverse=zeros(3))"),
        ("_cuda", "_cuda.describe(tensor=zeros(3))"),
    ],
)
def test_the_first_calls_of_two_threads_do_not_wait_for_each_other(module, call):
    """A first call imports torch, where the other thread may go on."""
    pytest.importorskip(f"sparsekern.{module}")
    script = f"""
import builtins, functools, threading, time, torch
from sparsekern import {module}
zeros = functools.partial(torch.zeros, dtype=torch.int64)
real, slow = builtins.__import__, []
def slow_import(name, *rest):
    if name == "torch":
        slow.append(name)
        time.sleep(0.5)
    return real(name, *rest)
builtins.__import__ = slow_import
threads = [threading.Thread(target=lambda: {call}) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert slow, "no import of a first call was seen"
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
