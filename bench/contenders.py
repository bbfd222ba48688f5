"""Everything that multiplies by a block-sparse matrix: ours, dense, and the libraries one would otherwise take.

A contender is built from a problem and answers with functions of (x, dy) for the products that it has, or raises: its
reason then stands in the results. What a library prepares once for a topology is prepared before any clock runs.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.problem import PRODUCTS, Problem
from sparsekern import choose
from sparsekern.backends import cuda, triton
from sparsekern.backends import dense as dense_path

Calls = dict[str, Callable[[Tensor, Tensor], Tensor]]
STEP = "three products"


def chosen(p: Problem) -> Calls:
    """What the chooser takes."""
    dds, sdd = (choose.backend_for(product, p.first[0], p.layout) for product in ("dds", "sdd"))
    return _backend(p, dds) | {"sdd": _backend(p, sdd)["sdd"]}


def kernels(p: Problem) -> Calls:
    """Our Triton kernels."""
    return _backend(p, triton)


def densified(p: Problem) -> Calls:
    """The chooser's other path: the vendor's GEMM between copies."""
    return _backend(p, dense_path)


def by_cuda(p: Problem) -> Calls:
    """Our kernels of csrc/cuda."""
    return _backend(p, cuda)


def _backend(p: Problem, backend) -> Calls:
    return {
        "dds transposed": lambda x, dy: backend.dds(x, p.weight, p.layout, None, True),
        "dds": lambda x, dy: backend.dds(dy, p.weight, p.layout),
        "sdd": lambda x, dy: backend.sdd(dy, x, p.layout),
    }


def dense(p: Problem) -> Calls:
    """nn.Linear: the vendor's GEMM."""
    return {
        "dds transposed": lambda x, dy: F.linear(x, p.dense),
        "dds": lambda x, dy: dy @ p.dense,
        "sdd": lambda x, dy: dy.t() @ x,
    }


def masked(p: Problem) -> Calls:
    """Mask times dense weight, which is what sparse training mostly is; its gradient is masked, too."""
    return {
        "dds transposed": lambda x, dy: F.linear(x, p.dense * p.mask),
        "dds": lambda x, dy: dy @ (p.dense * p.mask),
        "sdd": lambda x, dy: (dy.t() @ x) * p.mask,
    }


def torch_bsr(p: Problem) -> Calls:
    """torch.sparse._triton_ops with the parameters that it takes by itself."""
    from torch.sparse import _triton_ops

    if not hasattr(_triton_ops, "sampled_addmm"):
        raise RuntimeError("torch.sparse._triton_ops has no kernels without a GPU")
    w, wt = _bsr(p, p.dense), _bsr(p, p.dense.t().contiguous())
    n, k, tokens = p.case.out_features, p.case.in_features, p.case.tokens
    y, dx = (torch.empty(size, tokens, dtype=p.case.dtype, device=p.dense.device) for size in (n, k))

    def multiply(matrix, columns, out):
        return _triton_ops.bsr_dense_addmm(out, matrix, columns, beta=0, alpha=1, out=out).t()

    return {
        "dds transposed": lambda x, dy: multiply(w, x.t(), y),
        "dds": lambda x, dy: multiply(wt, dy.t(), dx),
        "sdd": lambda x, dy: _triton_ops.sampled_addmm(w, dy.t(), x, beta=0),
    }


def torch_bsr_tuned(p: Problem) -> Calls:
    """The same after torch's own tuner, which has none for the gradient of the weight."""
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    calls = torch_bsr(p)
    x, dy = p.first
    for matrix, columns in ((p.dense, x.t()), (p.dense.t().contiguous(), dy.t())):
        out = torch.empty(matrix.shape[0], columns.shape[1], dtype=p.case.dtype, device=matrix.device)
        tune_bsr_dense_addmm(out, _bsr(p, matrix), columns, beta=0, alpha=1, store=True)
    return calls


def torch_csr(p: Problem) -> Calls:
    """torch's CSR matrices, by cuSPARSE."""
    w, wt = p.dense.to_sparse_csr(), p.dense.t().contiguous().to_sparse_csr()
    return {
        "dds transposed": lambda x, dy: (w @ x.t()).t(),
        "dds": lambda x, dy: (wt @ dy.t()).t(),
        "sdd": lambda x, dy: torch.sparse.sampled_addmm(w, dy.t(), x, beta=0),
    }


def stk(p: Problem) -> Calls:
    """STK (MegaBlocks): blocks of 128. Its int16 indices overflow under Triton >= 3.2, so they become int32."""
    import stk
    import stk.ops

    if p.case.block_size != 128:
        raise RuntimeError(f"STK's tiles are 128 x 128; blocks of {p.case.block_size} give wrong results")
    w = stk.ops.to_sparse(p.dense, 128)
    indices = (w.row_indices, w.column_indices, w.offsets, w.column_indices_t, w.offsets_t, w.block_offsets_t)
    w = stk.Matrix(w.size(), w.data, *(t.int() for t in indices))
    return {
        "dds transposed": lambda x, dy: stk.ops.dds(x, w.t()),
        "dds": lambda x, dy: stk.ops.dds(dy, w),
        # sorted by row and column, as the slots of a random topology are
        "sdd": lambda x, dy: stk.ops.sdd(dy.t(), x, w).data,
    }


def blksprs(p: Problem) -> Calls:
    """blksprs, whose operands are all block-compressed; compressing x, dy and the outputs is not timed."""
    from blksprs.layouting.sparsity_layout import build_sparsity_layout
    from blksprs.ops.conversion import to_dense, to_sparse
    from blksprs.ops.matmul import matmul

    b = p.case.block_size
    if p.case.tokens % b:
        raise RuntimeError(f"blksprs: {p.case.tokens} tokens are no multiple of the block size {b}")

    def compressed(matrix: Tensor):
        matrix = matrix.contiguous()[None]
        layout = build_sparsity_layout(matrix, b)
        return to_sparse(matrix, layout, b), layout

    def product(left: Tensor, right: Tensor, into: Tensor):
        """Of fixed operands: the same in every round, but they take more memory than a cache holds."""
        (a, a_layout), (c, c_layout), cache = compressed(left), compressed(right), {}
        call = lambda: matmul(a, a_layout, c, c_layout, into, b, cache)  # noqa: E731
        result = to_dense(call(), into, b)[0]
        return call, result

    x, dy = p.first
    grid = [torch.ones(1, n // b, m // b, dtype=torch.bool, device=x.device) for n, m in (x.shape, dy.shape)]
    every = {
        "dds transposed": (x, p.dense.t(), grid[1]),
        "dds": (dy, p.dense, grid[0]),
        "sdd": (dy.t(), x, build_sparsity_layout(p.dense[None], b)),
    }
    calls = {}
    for name, operands in every.items():
        call, result = product(*operands)
        p.check(name, result)
        calls[name] = _checked(lambda x, dy, call=call: call())
    return calls


def torchao(p: Problem) -> Calls:
    """torchao 0.18's BlockSparseTensor: inference only."""
    from torchao.sparsity.blocksparse import BlockSparseTensor

    w = BlockSparseTensor.from_dense(p.dense, p.case.block_size)
    return {"dds transposed": lambda x, dy: F.linear(x, w, None)}  # it insists on three arguments


def cupy_csr(p: Problem) -> Calls:
    """cuSPARSE through CuPy, which has CSR of float32 and wider only."""
    import cupy
    from cupyx.scipy.sparse import csr_matrix

    if p.case.dtype.itemsize < 4:
        raise RuntimeError(f"CuPy's sparse matrices hold float32 and wider, not {p.case.dtype}")
    w, wt = (csr_matrix(cupy.from_dlpack(d.contiguous())) for d in (p.dense, p.dense.t()))

    def multiply(matrix, rows):
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            return torch.from_dlpack(matrix @ cupy.from_dlpack(rows.detach()).T).t()

    return {"dds transposed": lambda x, dy: multiply(w, x), "dds": lambda x, dy: multiply(wt, dy)}


def semi_structured(p: Problem) -> Calls:
    """2:4 by cuSPARSELt, of another weight of density 0.5; forward only, as training prunes and compresses anew."""
    if p.case.density != 0.5:
        raise RuntimeError(f"2:4 sparsity has density 0.5, not {p.case.density}")
    weight = torch.randn_like(p.dense) * torch.tensor([1, 1, 0, 0], device=p.dense.device, dtype=p.case.dtype).repeat(
        p.case.in_features // 4
    )
    w = torch.sparse.to_sparse_semi_structured(weight)
    call = _checked(lambda x, dy: F.linear(x, w))
    p.check("dds transposed", call(*p.first), weight)
    return {"dds transposed": call}


def _checked(call: Callable) -> Callable:
    """A call that its contender has compared with the truth itself."""
    call.checked = True
    return call


def _bsr(p: Problem, matrix: Tensor) -> Tensor:
    return matrix.to_sparse_bsr(2 * (p.case.block_size,))


OURS = {"chosen": chosen, "triton": kernels, "dense path": densified}
# In the order in which they are measured: those that run for long before they are timed come last.
RIVALS = {
    "mask x dense": masked,
    "STK": stk,
    "torch BSR": torch_bsr,
    "2:4": semi_structured,
    "torchao": torchao,
    "torch CSR": torch_csr,
    "CuPy CSR": cupy_csr,
    "blksprs": blksprs,
    "torch BSR, tuned": torch_bsr_tuned,
}


@lru_cache(maxsize=4)
def built(problem: Problem, build: Callable[[Problem], Calls]) -> Calls:
    """Its calls, once for all products; and all three products in turn, where it has them."""
    calls = build(problem)
    return calls | {STEP: step(calls)} if set(calls) == set(PRODUCTS) else calls


def right(problem: Problem, build: Callable[[Problem], Calls], product: str) -> Callable:
    """A call that gave the right result.

    Raises:
        ValueError: its result is wrong.
    """
    calls = built(problem, build)
    for name in PRODUCTS if product == STEP else (product,):
        if not getattr(calls[name], "checked", False):
            problem.check(name, calls[name](*problem.first))
            calls[name] = _checked(calls[name])
    return calls[product]


def step(calls: Calls) -> Callable[[Tensor, Tensor], None]:
    """The three products of a training step."""

    def run(x: Tensor, dy: Tensor) -> None:
        for product in PRODUCTS:
            calls[product](x, dy)

    return run


def reason(error: BaseException) -> str:
    """One line for the results."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
