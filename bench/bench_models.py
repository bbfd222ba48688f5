"""Training steps of whole models through `sparsify`, against dense, mask x dense, and a smaller dense of equal FLOP."""

import bisect
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from bench.case import Case
from bench.networks import check_same, masked, training_bytes
from bench.training import Training

WIDTH, HEADS, BLOCKS = 768, 12, 2  # of GPT-2 small and ViT-B, of whose 12 blocks these are so many


class Transformer(nn.Module):
    """A stack of pre-norm transformer blocks on tokens [sequences * length, 768]."""

    def __init__(self, hidden: int, length: int, causal: bool):
        super().__init__()
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, enable_nested_tensor=False)
        self.length, self.causal = length, causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(self.length) if self.causal else None
        return self.blocks(x.unflatten(0, (-1, self.length)), mask, is_causal=self.causal).flatten(0, 1)


def mlp(hidden: int) -> nn.Sequential:
    layers = [nn.Linear(WIDTH, hidden)]
    for _ in range(2):
        layers += [nn.ReLU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(hidden, WIDTH))


# Models by the width of what becomes sparse.
MODELS = {
    "MLP": mlp,
    "GPT-2-small blocks": lambda hidden: Transformer(hidden, length=512, causal=True),
    "ViT-B blocks": lambda hidden: Transformer(hidden, length=197, causal=False),
}


@dataclass(frozen=True)
class ModelCase(Case):
    """Its shape is that of a sparse layer."""

    model: str


def cases(model: str, hidden: int, tokens: int, block_sizes=(16, 32)) -> list[ModelCase]:
    return [ModelCase(hidden, WIDTH, tokens, 0.1, block_size, 1, model) for block_size in block_sizes]


CASES = {
    "smoke": cases("MLP", 64, 16, [16]),
    "quick": cases("MLP", 2048, 256, [16]),
    "full": [
        *cases("MLP", 2048, 256),
        *cases("MLP", 2048, 2048),
        *cases("GPT-2-small blocks", 3072, 512),
        *cases("ViT-B blocks", 3072, 2 * 197),
    ],
}


def num_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def equal_flop(build, sparse: nn.Module, hidden: int) -> nn.Module:
    """The widest dense model with no more weights, so with no more multiplications, than the sparse one has live."""

    def weights(hidden: int) -> int:
        with torch.device("meta"):
            return num_weights(build(hidden))

    return build(bisect.bisect_right(range(hidden), num_weights(sparse), key=weights) - 1)


PARTNERS = {
    "dense": lambda build, ours, case: build(case.out_features),
    "mask x dense": lambda build, ours, case: masked(ours),
    "smaller dense": lambda build, ours, case: equal_flop(build, ours, case.out_features),
}


@pytest.mark.parametrize("partner", PARTNERS)
def bench_step(compare, record, case, partner):
    build = MODELS[case.model]
    model = sk.sparsify(build(case.out_features), case.density, case.block_size, "uniform", keep="fresh")
    check_same(model, masked(model), torch.randn(case.tokens, WIDTH))
    ends = replace(case, out_features=WIDTH)
    ours, theirs = (Training(m, ends) for m in (model, PARTNERS[partner](build, model, case)))
    memory = {"ours_bytes": training_bytes(ours), "partner_bytes": training_bytes(theirs)}
    record(f"{case.model}: {partner}", partner=partner, **compare(ours.step, theirs.step), **memory)
