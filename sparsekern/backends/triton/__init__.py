"""The products on an NVIDIA GPU, by Triton kernels: block sizes 16 to 128; bfloat16, float16 and float32.

`kernels` holds the kernels, `launch` the launchers, `fill` and `copies` the copies of the dense path. They are
imported at the first product, since sparsekern must import where there is no Triton.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from sparsekern.layout import Layout

BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPERATIONS = ("dds", "sdd", "add_block_norms", "densify", "gather")


@functools.cache
def unavailable() -> str | None:
    """Why these kernels cannot run here, in a sentence; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (it comes with torch's CUDA builds)"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0 (A100)"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: what tests do on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(x: Tensor, layout: Layout) -> str | None:
    """What it takes, where it does not take these operands."""
    device = "cpu" if interpreted() else "cuda"
    if x.device.type == device and x.dtype in DTYPES and layout.block_size in BLOCK_SIZES:
        return None
    got = f"{x.dtype} on {x.device} in blocks of {layout.block_size}"
    return f"bfloat16, float16 and float32 on an NVIDIA GPU in blocks of 16, 32, 64 and 128, got {got}"


def __getattr__(name: str):
    """Import the launchers when one is first asked for."""
    if name not in (*OPERATIONS, "quick_dds", "quick_sdd", "quick_products"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsekern.backends.triton import copies, fill, launch, prepare

    globals().update(dds=launch.dds, sdd=launch.sdd, add_block_norms=launch.add_block_norms)
    globals().update(densify=fill.densify, gather=copies.gather)
    globals().update(quick_dds=launch.quick_dds, quick_sdd=launch.quick_sdd, quick_products=prepare.quick_products)
    return globals()[name]
