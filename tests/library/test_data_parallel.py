"""Data parallelism on two gloo processes: every rank must take the same decisions from different data."""

import multiprocessing
import os
from unittest import mock

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


def seed_apart(rank: int) -> None:
    for rule in (None, sk.SET, sk.RigL):
        model = build(rank, 4)  # as scripts do that seed every rank differently and trust that weights are broadcast
        own = model[0].topology.mask()
        parallel = DistributedDataParallel(model)
        assert torch.equal(model[0].topology.mask(), own) == (rank == 0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        step = rule(parallel, optimizer, update_every=2).step if rule else lambda: None
        ours = AssertionError("a step without a rule has no collective of ours")
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather, side_effect=None if rule else ours):
            for _ in range(5):
                optimizer.zero_grad()
                x = torch.randn(8, 32)
                (parallel(x) - x[:, :16]).square().mean().backward()
                optimizer.step()
                step()
        for layer in (model[0], model[2]):
            topology = layer.topology
            fresh = sk.Topology(*topology.layout[:2], topology.shape, topology.block_size, topology.groups)
            assert torch.equal(fresh.index, topology.index)
            for tensor in (topology.block_rows.int(), topology.block_cols.int(), layer.weight.detach()):
                first, second = gathered(tensor)
                assert torch.equal(first, second)


def convert_too_late(rank: int) -> None:
    """What is made sparse inside of a wrapper that is there already would be trained apart."""
    parallel = DistributedDataParallel(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    saved = sk.sparsify(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), 0.5, 8)
    for call in (
        lambda: sk.sparsify(parallel, 0.5, 8),
        lambda: sk.densify(nn.Sequential(parallel)),
        lambda: sk.load(parallel, saved.state_dict()),
    ):
        with pytest.raises(ValueError, match="is a DistributedDataParallel, which averages.*first, and wrap the model"):
            call()
    sk.sparsify(parallel.module, 0.5, 8)
    with pytest.raises(ValueError, match="SET: DistributedDataParallel was given another weight of layer 'module.0'"):
        sk.SET(parallel, torch.optim.SGD(parallel.parameters(), 0.1))
    parallel = DistributedDataParallel(parallel.module)
    sk.SET(parallel, torch.optim.SGD(parallel.parameters(), 0.1))


def different_plans(rank: int) -> None:
    layers = [sk.SparseLinear(32, 32, density=density, block_size=4) for density in (0.25, 0.5)]
    with pytest.raises(RuntimeError, match=r"ranks have \[\[1\], \[2\]\] sparse layers; build the same model"):
        DistributedDataParallel(nn.Sequential(*layers[: rank + 1]))
    with pytest.raises(RuntimeError, match=r"\[\[16, 32\], \[32, 16\]\] slots per sparse layer; build the same model"):
        DistributedDataParallel(nn.Sequential(*layers[:: 1 - 2 * rank]))


def shard_state(rank: int) -> None:
    """ZeroRedundancyOptimizer keeps the state of a weight on one rank only, in the optimiser that it wraps."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = build(0, 4)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
    rule = sk.SET(model, optimizer, update_every=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 32, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
        rule.step()
    states = [optimizer.optim.state.get(layer.weight, {}) for layer in (model[0], model[2])]
    assert sum(map(bool, states)) < 2
    for layer, state in zip((model[0], model[2]), states, strict=True):
        rewired = ~layer.weight.any(dim=(1, 2))
        assert rewired.any() and not (state and state["exp_avg"][rewired].any())


def shard(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, alone = build(0, 4), build(0, 4)
    for module in (model[0], model[2], model):
        fully_shard(module)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, alone)]
    static = sk.Static(model)
    for step in range(4):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        for m, part in ((model, x.chunk(2)[rank]), (alone, x)):
            m.zero_grad()
            (m(part) - part[:, :16]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert not static.step()
    for sharded, plain in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(sharded.full_tensor(), plain.detach())
    for rule in (sk.SET, sk.RigL, lambda *a: sk.GMP(*a, end_step=10)):
        with pytest.raises(ValueError, match="layer '0' is a DTensor: this rank holds a part.*DistributedDataParallel"):
            rule(model, optimizers[0])
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        other = build(1, 4)
        other.load_state_dict(full)
        torch.testing.assert_close(other(x), alone(x))
    with pytest.raises(NotImplementedError, match="only support nn.Linear"):
        parallelize_module(build(0, 4), init_device_mesh("cpu", (RANKS,)), {"0": ColwiseParallel()})


def spawn(function, tmp_path, *args) -> None:
    # a fork server imports torch once for all tests; a plain spawn takes four seconds for it in every process
    multiprocessing.set_forkserver_preload(["torch.distributed", "sparsekern"])
    arguments = (str(tmp_path / "rendezvous"), function, *args)
    mp.start_processes(run, arguments, nprocs=RANKS, start_method="forkserver")


@pytest.mark.parametrize(("rule", "block_size"), [("SET", 4), ("RigL", 4), ("RigL", 1)])
def test_ranks_keep_one_topology_while_they_see_different_data(tmp_path, rule, block_size):
    spawn(train, tmp_path, rule, block_size)


def test_rigl_sums_its_scores_over_the_ranks(tmp_path):
    spawn(score_together, tmp_path)


def test_a_rule_refuses_ranks_that_start_with_different_topologies(tmp_path):
    spawn(refuse, tmp_path)


def test_gmp_does_not_compact_under_data_parallelism(tmp_path):
    spawn(keep_dead_slots, tmp_path)


def test_ranks_that_were_seeded_differently_get_the_topology_of_rank_0_with_its_weights(tmp_path):
    spawn(seed_apart, tmp_path)


def test_optimiser_state_that_is_spread_over_the_ranks_follows_a_rewire(tmp_path):
    spawn(shard_state, tmp_path)


def test_a_model_is_made_sparse_before_it_is_wrapped(tmp_path):
    spawn(convert_too_late, tmp_path)


def test_ranks_with_different_numbers_of_layers_or_slots_are_refused(tmp_path):
    spawn(different_plans, tmp_path)


def test_sharded_layers_train_with_a_fixed_topology_and_rules_and_tensor_parallelism_are_refused(tmp_path):
    spawn(shard, tmp_path)
