"""Candidates for growth, best first, while a dense gradient is never held.

A candidate is one int64 key: 31 bits of score above 32 bits of inverted position, so that the largest keys are the best
scores, ties go to the lower position, and every device selects alike. Scores are the bits of a non-negative float32
(RigL's squared gradient norms) or of a hash (SET's uniform choice). -1 is no candidate.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsekern import choose
from sparsekern.layout import Layout
from sparsekern.operators import LAYOUT_SCHEMA, check_devices, check_operand, checked, library
from sparsekern.routes import check_unchanged, in_transform
from sparsekern.topology import Topology

# Elements looked at in one go: 2 MB of keys, about a core's cache.
STRIP = 2**18

_LOW = 2**32 - 1


def pack(scores: Tensor, positions: Tensor) -> Tensor:
    """Keys of int64 scores in [0, 2**31) at int64 positions in [0, 2**32)."""
    return (scores << 32) | (_LOW - positions)


def positions_of(keys: Tensor) -> Tensor:
    """Position of each key's block within its group; -1 where there is no candidate."""
    return torch.where(keys < 0, -1, _LOW - (keys & _LOW))


def scores_of(keys: Tensor) -> Tensor:
    """float32 score of keys that were packed from floats; 0 where there is no candidate."""
    return (keys >> 32).clamp(min=0).int().view(torch.float32)


def float_bits(scores: Tensor) -> Tensor:
    """int64 bits of non-negative float32 scores, which order as the scores do; -1 for what is not finite."""
    return torch.where(scores.isfinite(), scores.float().contiguous().view(torch.int32).long(), -1)


def best_candidates(layout: Layout, count: int, score: Callable[[slice, Tensor], Tensor], elements: int = 1) -> Tensor:
    """Keys [groups, count] of the best dead blocks of every group, best first, by a running top-k over strips.

    Args:
        count: how many to keep; fewer may exist.
        score: called with a slice of block rows (of every group) and the positions in it, int64 [rows * cols]; returns
            int64 [groups, rows * cols] scores in [0, 2**31), negative for blocks that must not grow.
        elements: how many `score` looks at for each position.
    """
    groups, rows, cols = layout.groups, layout.num_rows // layout.groups, layout.num_cols // layout.groups
    positions = layout.positions()
    group, position = positions // (rows * cols), positions % (rows * cols)
    best = torch.full((groups, count), -1, dtype=torch.int64, device=positions.device)
    height = max(1, STRIP // (groups * cols * elements))
    for top in range(0, rows, height):
        strip = slice(top, min(top + height, rows))
        start, size = top * cols, (strip.stop - top) * cols
        places = torch.arange(start, start + size, device=positions.device)
        scores = score(strip, places)
        keys = torch.where(scores < 0, -1, pack(scores, places))
        # live blocks are no candidates; those outside this strip (and dead slots) write to a column of their own
        keys = torch.cat((keys, best, keys.new_full((groups, 1), -1)), dim=1)
        width = keys.shape[1]
        inside = (position >= start) & (position < start + size) & (group < groups)
        keys.view(-1).index_fill_(0, torch.where(inside, group * width + position - start, width - 1), -1)
        best = keys.topk(count, dim=1).values
    return best


class GrowthScores:
    """RigL's scores of one layer: while armed, every backward adds its squared gradient norms.

    Several micro-batches between arming and reading sum up. Block sizes above 1 keep a float32 sum for every block,
    [groups, rows, cols], negative where nothing was scored. Block size 1 keeps the keys [groups, count] of its
    `num_slots` best dead blocks, best first: a block must be among the best so far to keep its sum.

    Args:
        armed: a flag that layers of the topology's device share; without it, the layer has one of its own.
    """

    def __init__(self, topology: Topology, armed: Tensor | None = None):
        device = topology.index.device
        # plain tensors: as buffers, DistributedDataParallel would overwrite every rank's scores with those of rank 0
        self.armed = torch.zeros((), dtype=torch.bool, device=device) if armed is None else armed
        if topology.block_size > 1:
            rows, cols = (n // topology.groups for n in topology.grid)
            self.scores = torch.full((topology.groups, rows, cols), -1.0, dtype=torch.float32, device=device)
        else:
            dead = topology.num_blocks // topology.groups - min(topology.live_per_group())
            count = min(dead, topology.num_slots)
            self.scores = torch.full((topology.groups, count), -1, dtype=torch.int64, device=device)

    def watch(self, y: Tensor, x: Tensor, token_offsets: Tensor | None, layout: Layout) -> Tensor:
        """Return y = x Wᵀ unchanged, and score the gradient of W in backward passes that come to it.

        Raises:
            RuntimeError: a transform of torch.func is at work, where nothing outside may be written.
        """
        if not torch.compiler.is_compiling() and in_transform():
            raise RuntimeError(
                "RigL: the gradient of a layer cannot be scored inside torch.func.grad, vmap or jvp; "
                "compute the loss without them, or use SET, which needs no scores"
            )
        if torch._C._get_tracing_state() is not None:
            return y  # torch.jit.trace holds no such Function, and would find that its two traces differ
        # compiled autograd cannot add up a gradient of x that is None here, and another of the product
        return _Watch.apply(y, x.detach(), token_offsets, self.armed, self.scores, layout)


def arm(growth: Sequence[GrowthScores], armed: bool) -> None:
    """Begin to score, with no scores; or stop. Device flags, so that compiled and captured steps obey them."""
    for flag in {id(one.armed): one.armed for one in growth}.values():
        flag.fill_(armed)
    if armed:
        scores = [one.scores for one in growth]
        torch._foreach_zero_(scores)
        torch._foreach_sub_(scores, 1)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, token_offsets, armed, scores, layout):
        ctx.save_for_backward(x, token_offsets, armed, *layout.tensors)
        ctx.scores, ctx.geometry = scores, layout.geometry
        if not torch.compiler.is_compiling():
            ctx.layout, ctx.versions = layout, layout.versions()
        return y.detach()  # a view made here would refuse nn.ReLU(inplace=True)

    @staticmethod
    def backward(ctx, dy):
        if not torch.compiler.is_compiling():
            check_unchanged(ctx.layout, ctx.versions)
            product, _ = ctx.next_functions[0]
            if not _is_reached(product.next_functions[1][0]):  # of x, weight, bias
                return dy, None, None, None, None, None
        x, token_offsets, armed, *tensors = ctx.saved_tensors
        torch.ops.sparsekern.score_growth(dy, x, token_offsets, *tensors, *ctx.geometry, armed, ctx.scores)
        return dy, None, None, None, None, None


def _is_reached(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward pass that runs comes to this node of a parameter.

    It does not where gradients of other tensors are asked for, as those of an input in adversarial training. What an
    autograd Function says of the gradients that it needs is of its forward.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # "A leaf node was passed": its gradient is one of those that autograd.grad was asked for
        return True


library.define(
    f"score_growth(Tensor dy, Tensor x, Tensor? token_offsets, {LAYOUT_SCHEMA}, Tensor armed, Tensor(a!) scores) -> ()"
)


def _score_growth(dy, x, token_offsets, *args):
    *layout, armed, scores = args
    if armed.dtype != torch.bool or armed.dim():
        raise ValueError(f"score_growth: armed must be a boolean (), got {armed.dtype} {tuple(armed.shape)}")
    if armed.device.type == "cpu" and not armed:  # elsewhere reading the flag would synchronise
        return
    layout = Layout.from_flat(layout)
    _check_scores(dy, x, token_offsets, layout, armed, scores)
    dy, x = dy.detach().contiguous(), x.detach()
    if layout.block_size == 1:
        _keep_best(dy, x, token_offsets, layout, armed, scores)
    else:
        backend = choose.backend_for("add_block_norms", x, layout, token_offsets)
        backend.add_block_norms(dy, x, layout, scores, armed, token_offsets)


def _keep_best(dy, x, token_offsets, layout, armed, keys):
    held, held_positions = scores_of(keys), positions_of(keys)
    block_norms = choose.backend_for("block_norms", x, layout, token_offsets).block_norms

    def score(strip: slice, places: Tensor) -> Tensor:
        norms = block_norms(dy, x, layout, strip, token_offsets).flatten(1)
        inside = (held_positions >= places[0]) & (held_positions <= places[-1])
        index = torch.where(inside, held_positions - places[0], 0)
        return float_bits(norms.scatter_add(1, index, torch.where(inside, held, 0)))

    keys.copy_(torch.where(armed, best_candidates(layout, keys.shape[1], score), keys))


def _check_scores(dy, x, token_offsets, layout: Layout, armed, scores) -> None:
    """Refuse what does not fit the layout: the backends would follow it."""
    checked(layout)
    check_devices("score_growth", x, dy, token_offsets, layout.index, armed, scores)
    check_operand("score_growth", "dy", dy, layout.num_rows, layout, token_offsets)
    check_operand("score_growth", "x", x, layout.num_cols, layout, token_offsets)
    if dy.dtype != x.dtype or len(dy) != len(x):
        raise ValueError(f"score_growth: dy is {dy.dtype} of {len(dy)} tokens, but x {x.dtype} of {len(x)}")
    groups = layout.groups
    if layout.block_size == 1:
        dtype, shape, fits = torch.int64, (groups, "any"), scores.dim() == 2 and scores.shape[0] == groups
    else:
        dtype, shape = torch.float32, (groups, layout.num_rows // groups, layout.num_cols // groups)
        fits = scores.shape == shape
    if scores.dtype != dtype or not fits:
        want = f"{dtype} ({', '.join(map(str, shape))})"
        raise ValueError(f"score_growth: scores must be {want}, got {scores.dtype} {tuple(scores.shape)}")


def _fake_score_growth(dy, x, token_offsets, *args) -> None:
    *layout, armed, scores = args
    check_devices("score_growth", x, dy, token_offsets, *layout[:3], armed, scores)


library.impl("score_growth", _score_growth, "CPU")
library.impl("score_growth", _score_growth, "CUDA")
torch.library.register_fake("sparsekern::score_growth", _fake_score_growth, lib=library)
