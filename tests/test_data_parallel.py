"""Data parallelism on two gloo processes: every rank must take the same decisions from different data."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk

RANKS = 2


def build(seed: int, block_size: int) -> nn.Sequential:
    torch.manual_seed(seed)
    make = lambda i, o: sk.SparseLinear(i, o, density=0.25, block_size=block_size)  # noqa: E731
    return nn.Sequential(make(32, 64), nn.ReLU(), make(64, 16))


def run(rank: int, file: str, function, *args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    function(rank, *args)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own way out ("terminate called ...")


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def train(rank: int, rule_name: str, block_size: int) -> None:
    model = build(0, block_size)
    before = [model[i].topology.mask() for i in (0, 2)]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rule = getattr(sk, rule_name)(model, optimizer, drop_fraction=0.3, update_every=2)
    parallel = DistributedDataParallel(model)
    torch.manual_seed(100 + rank)  # different data
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(8, 32)
        (parallel(x) - x[:, :16]).square().mean().backward()
        optimizer.step()
        rule.step()
    for i, old in zip((0, 2), before, strict=True):
        assert not torch.equal(model[i].topology.mask(), old)
        for tensor in (model[i].topology.block_rows.int(), model[i].topology.index, model[i].weight.detach()):
            first, second = gathered(tensor)
            assert torch.equal(first, second)


def score_together(rank: int) -> None:
    """RigL grows the blocks whose squared gradient norms, summed over the ranks, are largest."""
    torch.manual_seed(0)
    layer = sk.SparseLinear(32, 64, density=0.25, block_size=4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    rule = sk.RigL(layer, optimizer, drop_fraction=0.5, update_every=1)
    before = layer.topology.mask()[0]
    torch.manual_seed(100 + rank)
    x, dy = torch.randn(8, 32), torch.randn(8, 64)
    layer(x).backward(dy)
    rule.step()
    norms = (dy.T @ x).view(16, 4, 8, 4).square().sum(dim=(1, 3))
    norms = torch.stack(gathered(norms)).sum(0).masked_fill(before, -1)
    grown = layer.topology.mask()[0] & ~before
    best = norms.flatten().topk(int(grown.sum())).indices
    assert set(grown.flatten().nonzero().flatten().tolist()) == set(best.tolist())


def refuse(rank: int) -> None:
    model = build(rank, 4)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(RuntimeError, match="different topologies in layer '0'"):
        sk.SET(model, optimizer)


def keep_dead_slots(rank: int) -> None:
    model = build(0, 4)
    slots = model[0].topology.num_slots
    rule = sk.GMP(model, torch.optim.Adam(model.parameters()), final_density=0.05, end_step=2, update_every=1)
    rule.step()
    rule.step()
    assert model[0].topology.num_slots == slots and rule.compactions == 0
    assert model[0].topology.num_live < slots


def spawn(function, tmp_path, *args) -> None:
    mp.spawn(run, (str(tmp_path / "rendezvous"), function, *args), nprocs=RANKS)


@pytest.mark.parametrize(("rule", "block_size"), [("SET", 4), ("RigL", 4), ("RigL", 1)])
def test_ranks_keep_one_topology_while_they_see_different_data(tmp_path, rule, block_size):
    spawn(train, tmp_path, rule, block_size)


def test_rigl_sums_its_scores_over_the_ranks(tmp_path):
    spawn(score_together, tmp_path)


def test_a_rule_refuses_ranks_that_start_with_different_topologies(tmp_path):
    spawn(refuse, tmp_path)


def test_gmp_does_not_compact_under_data_parallelism(tmp_path):
    spawn(keep_dead_slots, tmp_path)
