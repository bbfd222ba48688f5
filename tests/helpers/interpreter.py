"""Repairs of Triton's interpreter (3.6 to 3.9) for kernel tests on a CPU, and memory whose end must not be passed.

bfloat16 values are held as uint16 there: `tl.dot` multiplies these bit patterns, and a cast from float32 truncates
(triton issue 11584). Triton 3.6 also refuses run-time bounds of `range` under NumPy >= 2.4 (triton issue 9171), and no
version knows the precisions "bf16x3" and up; here they are exact, as tf32 is. bfloat16 arithmetic other than dots and
casts stays wrong; the kernels have none, since they sum in float32.
"""

import ctypes
import dataclasses
import math
import mmap

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Patch the interpreter of this process; once."""
    patch_tensor, cast, dot = (
        interpreter._patch_lang_tensor,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
    )
    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
        scope[0].set_attr(tensor, "__index__", index) if scope else setattr(tensor, "__index__", index)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, src, dst_type)
        if target == tl.bfloat16:
            return TensorHandle(_to_bf16_bits(src.data), target)
        return TensorHandle(_numbers(src).astype(interpreter._get_np_dtype(dst_type)), target)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *precision):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *precision)
        return TensorHandle(np.matmul(_numbers(a), _numbers(b)) + d.data, d.dtype.scalar)

    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast_impl, create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    options = interpreter.interpreter_builder.options
    precisions = (*options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    interpreter.interpreter_builder.options = dataclasses.replace(options, allowed_dot_input_precisions=precisions)


def _to_bf16_bits(numbers: np.ndarray) -> np.ndarray:
    """Round to nearest even."""
    numbers = np.array(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _numbers(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32)


def guarded(tensor: Tensor) -> Tensor:
    """A copy at the very end of its memory: whoever reads or writes one element further is killed."""
    if not tensor.numel():
        return tensor.clone()
    copy = unbacked(tensor.shape, tensor.dtype)
    return copy.copy_(tensor)


def unbacked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros between two forbidden pages; only what is touched takes memory, so it may be gigabytes."""
    size = math.prod(shape) * dtype.itemsize
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, length + 2 * mmap.PAGESIZE, flags=flags)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + mmap.PAGESIZE + length):
        forbidden = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0)
        assert forbidden == 0
    offset = mmap.PAGESIZE + length - size
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
