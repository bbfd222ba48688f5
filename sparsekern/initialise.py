"""init_: a user's own rule of initialisation for sparse layers."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekern.layer import SparseLayer


@torch.no_grad()
def init_(layer: SparseLayer, function: Callable[..., object], **options) -> SparseLayer:
    """Draw the weight of a sparse layer by a rule for dense matrices, as those of torch.nn.init.

    `function` fills a dense weight of the layer's shape, and so sees its real fans. Each row is then multiplied by
    sqrt(fan_in / inputs that the row really reads), and the live blocks are taken. So the output has the variance that
    the rule gives a dense layer's; rows without live blocks stay zero, as do padding and dead slots. The bias is left
    as it is. torch.nn.init on `layer.weight` itself would take its fans from the slots' shape [num_slots, B, B].

    Args:
        layer: a SparseLinear or SparseConv2d.
        function: called as function(weight, **options) on a tensor [out, in] of each group, of a convolution
            [out, in / groups, kh, kw]; fills it in place.
    Returns:
        The layer.
    Raises:
        TypeError: the layer is no sparse layer, or the function cannot be called.
        ValueError: the function does not fill the tensor in place. The layer is left as it was, whatever is raised.
    Example:
        >>> layer = SparseLinear(256, 256, density=0.1)
        >>> init_(layer, torch.nn.init.kaiming_normal_, nonlinearity="relu").weight.shape
        torch.Size([26, 16, 16])
    """
    if not isinstance(layer, SparseLayer):
        raise TypeError(f"init_: layer must be a SparseLinear or SparseConv2d, got {type(layer).__name__}")
    if not callable(function):
        raise TypeError(f"init_: function must be callable, as torch.nn.init.xavier_uniform_, got {function!r}")
    topology = layer.topology
    out, into = (size // topology.groups for size in topology.shape)
    kernel = getattr(layer, "kernel_size", ())
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # orthogonal_ knows no 16-bit numbers
    matrices = torch.empty(topology.groups, out, into, dtype=dtype, device=layer.weight.device)
    matrices.fill_(torch.nan)  # what the function leaves out is found, and never taken for a weight
    for matrix in matrices:
        function(matrix.view(out, -1, *kernel), **options)
    if not matrices.is_meta and matrices.isnan().any():
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"init_: function must fill a tensor {[out, into]} in place, but {name} left NaN in it")
    layer.take_blocks(matrices * _row_scales(layer, out, into)[..., None])
    return layer


def _row_scales(layer: SparseLayer, out: int, into: int) -> Tensor:
    """float32 [groups, out]: by how much a row of real fan-in is larger than one that reads every input."""
    scales = (into / layer.fan_in().clamp(min=1)).sqrt().repeat_interleave(layer.block_size)
    return scales.view(layer.groups, -1)[:, :out]
