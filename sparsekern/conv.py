"""SparseConv2d: nn.Conv2d with a block-sparse weight, by im2col and the same products as SparseLinear."""

import numbers

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import choose
from sparsekern.backends import cpu, dense
from sparsekern.dense_copy import densify
from sparsekern.layer import SparseLayer
from sparsekern.products import dds
from sparsekern.topology import Topology

# im2col pays where skipping dead blocks saves more than writing x out costs. On a CPU, forward and backward, writing it
# out takes as long as the vendor's convolution takes for about 128 output channels.
IM2COL_COST = 128


class SparseConv2d(SparseLayer):
    """A 2-D convolution whose weight, as the matrix [out_channels, in_channels * kh * kw], is block-sparse.

    Args:
        in_channels ... dtype: as in nn.Conv2d, 'same' and 'valid' padding and all padding modes included.
        density: live blocks / all blocks, in (0, 1].
        block_size: power of two from 1 to 128. A block holds input taps in F.unfold's order (channel, kh, kw).
        topology: live blocks to start from, instead of a random topology of this density.

    Shapes: x [N, in_channels, H, W] or [in_channels, H, W]; weight [num_slots, B, B]; bias [out_channels].
    im2col writes x out kh * kw times over, so a convolution gains less time from sparsity than a linear layer does: at
    density 1, on a GPU, and on a CPU with fewer than some 200 output channels per group, the layer runs F.conv2d on a
    dense weight made for the call. Weight, gradient and optimiser state are kept for live blocks only either way.
    RigL's scores need im2col, so under RigL it is taken at every density below 1.

    Example:
        >>> layer = SparseConv2d(32, 64, 3, padding=1, density=0.1, block_size=16)
        >>> layer(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        density: float = 0.1,
        block_size: int = 16,
        topology: Topology | None = None,
    ):
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("out_channels", out_channels, 1),
            ("kernel_size", kernel_size, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        ):
            _check_size(name, value, least)
        # nn.Conv2d checks how they fit together, writes them out as pairs and works out what 'same' pads
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        shape = (out_channels, in_channels * conv.kernel_size[0] * conv.kernel_size[1])
        super().__init__(shape, bias, device, dtype, density, block_size, groups, topology)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, padding_mode
        self._edges = tuple(conv._reversed_padding_repeated_twice)  # left, right, top, bottom

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"SparseConv2d: x must be [N, {self.in_channels}, H, W] or [{self.in_channels}, H, W], "
                f"got {tuple(x.shape)}"
            )
        left, right, top, bottom = self._edges
        padding = (top, left)
        if self.padding_mode != "zeros" or padding != (bottom, right):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._edges, mode=mode), (0, 0)
        if self._is_dense() or self.growth is None and not self._im2col_pays(x):
            return F.conv2d(x, self._conv_weight(), self.bias, self.stride, padding, self.dilation, self.groups)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, self.dilation, self.kernel_size, self.stride, strict=True)
        ]
        taps = F.unfold(x, self.kernel_size, self.dilation, padding, self.stride)  # [N, in_channels * kh * kw, oh * ow]
        y = dds(taps.transpose(1, 2), self.weight, self.topology, self.bias, transpose=True, growth=self.growth)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        y = y.transpose(1, 2).unflatten(2, size)  # channels last; but callers may view(N, -1) what nn.Conv2d gives them
        return y if channels_last else y.contiguous()

    def _check(self, x: Tensor) -> None:
        """Refuse operands that do not fit; torch's convolution, on the dense path, would not name them."""
        topology, weight, bias = self.topology, self.weight, self.bias
        for name, operand in (("x", x), ("weight", weight), ("bias", bias)):
            if not isinstance(operand, Tensor) and not (name == "bias" and operand is None):
                raise TypeError(f"SparseConv2d: {name} must be a tensor, got {type(operand).__name__}")
        if x.layout != torch.strided:
            raise ValueError(f"SparseConv2d: x must be dense, got {x.layout}")
        if not x.is_floating_point():
            raise ValueError(f"SparseConv2d: x must be real floating-point numbers, got {x.dtype}")
        blocks = (topology.num_slots, topology.block_size, topology.block_size)
        if weight.shape != blocks:
            raise ValueError(f"SparseConv2d: topology wants a weight of shape {blocks}, got {tuple(weight.shape)}")
        if bias is not None and bias.shape != (self.out_channels,):
            raise ValueError(f"SparseConv2d: topology wants {self.out_channels} biases, got {tuple(bias.shape)}")
        casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        for operand in (weight,) if bias is None else (weight, bias):
            if operand.dtype != x.dtype and not casts:
                raise ValueError(f"SparseConv2d: operands must have one dtype, got {x.dtype} and {operand.dtype}")
            if operand.device != x.device:
                raise ValueError(f"SparseConv2d: operands must be on one device, got {x.device} and {operand.device}")
        if topology.index.device != x.device:
            where = topology.index.device
            raise ValueError(f"SparseConv2d: operands are on {x.device}, but the topology is on {where}")

    def _is_dense(self) -> bool:
        """Whether the weight is a full store, which F.conv2d takes as it is, and nobody forces another backend."""
        return self.topology.full and choose.forced() in (None, dense)

    def _im2col_pays(self, x: Tensor) -> bool:
        """Whether the sparse product is likely the faster path, or forced; reads no tensor."""
        if (forced := choose.forced()) is not None:
            return forced is not dense
        if x.device.type != "cpu" or cpu.unavailable():
            return False
        density = self.topology.num_slots / self.topology.num_blocks
        return (
            self.out_channels // self.groups * (1 - density / choose.break_even(self.block_size, x.dtype)) > IM2COL_COST
        )

    def _conv_weight(self) -> Tensor:
        """The weight [out_channels, in_channels / groups, kh, kw]; differentiable, dead slots have no gradient."""
        dense = densify(self.weight, self.topology.layout)
        if self.topology.padded:
            out, into = (size // self.groups for size in self.topology.shape)
            dense = dense[:, :out, :into]
        return dense.reshape(self.out_channels, -1, *self.kernel_size)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, density: float = 0.1, block_size: int = 16, keep: str | Tensor = "magnitude"
    ) -> "SparseConv2d":
        """Build the block-sparse layer of an nn.Conv2d; arguments as in `SparseLinear.from_linear`.

        A mask is [out_channels, in_channels / groups, kh, kw] by elements, or [groups, rows, cols] by blocks.
        """
        return cls._from_dense(conv, density, block_size, keep)

    @staticmethod
    def _dense_type() -> type[nn.Module]:
        return nn.Conv2d

    @classmethod
    def _like(cls, conv: nn.Conv2d, topology: Topology) -> "SparseConv2d":
        return cls(*_options(conv), conv.weight.device, conv.weight.dtype, topology=topology)

    @torch.no_grad()
    def to_conv2d(self) -> nn.Conv2d:
        """The dense nn.Conv2d of the same function."""
        conv = nn.Conv2d(*_options(self), self.weight.device, self.weight.dtype)
        conv.weight.copy_(self._conv_weight()).requires_grad_(self.weight.requires_grad)
        if self.bias is not None:
            conv.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, "
            f"padding_mode={self.padding_mode!r}, bias={self.bias is not None}"
        )


def _check_size(name: str, value: int | tuple[int, int] | str, least: int) -> None:
    """Refuse what nn.Conv2d lets pass, or refuses in the words of torch.empty; a padding's word is its business."""
    if isinstance(value, str) and name == "padding":
        return
    pair = isinstance(value, tuple | list) and "channels" not in name
    sizes = value if pair else (value,)
    whole = all(isinstance(size, numbers.Integral) and not isinstance(size, bool) for size in sizes)
    if not whole or (pair and len(sizes) not in (1, 2)) or min(sizes) < least:
        raise ValueError(f"SparseConv2d: {name} must be an integer of {least} or more, or a pair, got {value!r}")


def _options(conv: nn.Conv2d | SparseConv2d) -> tuple:
    """What both classes' constructors take, up to padding_mode."""
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
