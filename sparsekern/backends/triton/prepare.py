"""Launches that C++ makes: what Triton compiled, ready with its grid and constants.

Triton binds and specialises every argument at every launch and looks the variant up under a text of them all. A
prepared launch knows all of that, and takes the tensors' addresses, the number of tokens and the stream. Where
`sparsekern._cuda` is missing, every launch goes through Triton. Hooks that a profiler hangs into Triton's launcher see
no prepared launch.
"""

from collections.abc import Callable

import torch
from triton.runtime import driver

try:
    from sparsekern import _cuda
except ImportError:
    _cuda = None

# From torch itself, without the checks that torch.cuda.current_device makes at every call. A torch without CUDA has no
# device; whoever replaces Triton's driver there is asked instead.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: driver.active.get_current_device())
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: driver.active.get_current_stream(device)
)


def prepare(
    compiled, numbers: dict[str, int], grid: tuple[int, int, int, int], matrices: list[tuple[int, int]]
) -> Callable[..., bool] | None:
    """A function that launches a compiled kernel on the current device; None where it must be launched by Triton.

    Args:
        compiled: what a launch by Triton returned, of tensors and strides that were multiples of 16. Kernels call the
            address of tensor t `t_ptr`, its descriptor `t_desc`, the stride of its rows `t_stride`, and the tokens
            `num_tokens`.
        numbers: values of all other integers, and of strides that are known.
        grid: (tokens of a program, or 0; programs more; outputs; programs along y): there are
            (ceil(tokens / tokens of a program) + programs more) * outputs programs along x.
        matrices: (rows, width) of every tensor that descriptors load; one is contiguous, or has the tokens for rows,
            which 0 rows stand for.
    Returns:
        launch(tokens=..., stream=..., and the tensors by name), which says whether it launched: not where a value is
        no multiple of 16 or over 31 bits long, for which Triton compiles another variant; or where no descriptor takes
        a matrix.
    """
    if _cuda is None:
        return None
    metadata, (warps, programs_per_cluster, shared) = compiled.metadata, compiled.packed_metadata
    needs = (
        metadata.global_scratch_size,
        metadata.profile_scratch_size,
        metadata.launch_cooperative_grid,
        metadata.launch_pdl,
        getattr(metadata, "instrumentation_mode", ""),
    )
    # none where a device has no TMA; Triton then passes what descriptors are made of
    wanted = getattr(metadata, "tensordesc_meta", None) or []
    if any(needs) or programs_per_cluster != 1 or shared > 227 * 1024 or len(wanted) != len(matrices):
        return None
    descriptors = iter(zip(matrices, wanted, strict=True))
    tensors, parameters = [], []
    for name, kind in compiled.src.signature.items():
        if name.endswith(("_ptr", "_desc")):
            tensors.append(name.rpartition("_")[0])
        if kind == "constexpr":  # constants, and tensors that are None
            continue
        if name.endswith("_desc"):
            described = _described(tensors[-1], *next(descriptors))
            if described is None:
                return None
            parameters += described
        elif name.endswith("_ptr"):
            parameters.append(("address", tensors[-1]))
        elif kind != "i32":
            return None
        elif name in numbers:
            parameters.append(("number", numbers[name]))
        elif name == "num_tokens":
            parameters.append(("tokens", None))
        else:
            parameters.append(("stride", name.removesuffix("_stride")))
    # behind the kernel's own parameters, Triton 3.6 to 3.9 pass two addresses of scratch memory, which these need not
    parameters += [("nothing", None), ("nothing", None)]
    return _cuda.prepare(
        name=metadata.name, function=compiled.function, device=current_device(), threads=32 * warps, shared=shared,
        grid=grid, tensors=tensors, parameters=parameters, specialised=True, owner=compiled,
    )  # fmt: skip


def _described(tensor: str, matrix: tuple[int, int], wanted: dict) -> list[tuple] | None:
    """What Triton 3.6 to 3.9 pass for a descriptor of two axes: a CUtensorMap, both sizes and both strides."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if wanted["fp4_padded"] or wanted.get("is_im2col") or len(wanted["block_size"]) != 2:
        return None
    (rows, width), (box_rows, box_width) = matrix, wanted["block_size"]
    described = {
        "tensor": tensor,
        "data_type": TMA_DTYPE_DEVICE_TO_HOST[wanted["elem_type"]],
        "element_bytes": wanted["elem_size"],
        "swizzle": wanted["swizzle"],
        "box_rows": box_rows,
        "box_width": box_width,
        "rows": rows,
        "width": width,
    }
    size, stride = (("number", rows), ("number", width)) if rows else (("tokens", None), ("map_stride", tensor))
    return [("map", described), size, ("number", width), stride, ("number", 1)]


def quick_products() -> tuple[Callable, Callable, Callable, Callable]:
    """What `_cuda.products` makes for this process."""
    return _cuda.products(
        current_device=current_device, current_stream=current_stream, precision=torch.get_float32_matmul_precision
    )
