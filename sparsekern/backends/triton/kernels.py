"""The Triton kernels: dds and sdd over the index of a Layout, and the block norms of a dense gradient.

What shapes them, on Hopper (figures from ahead-of-time compilation):
* Blocks are scattered, so L2-to-SM traffic is the limit. A small block is on the N side of the tensor-core instruction
  (any multiple of 8), tokens or gathered columns on its M side (multiples of 64).
* A pair (column, slot) of the index is loaded one turn ahead, as one int64 word: loaded in the turn that uses it, it
  takes half of the pipeline's stages.
* Grids depend on capacity (slots, block rows, tokens) and never on what is live, so that captured CUDA graphs follow a
  rewire. The hardware hands out programs in order, so an order with the heavy rows first balances the load.
"""

import triton
import triton.language as tl


@triton.jit
def _tile_of_group(token_offsets_ptr, tile, num_groups, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr):
    """Number the token tiles of all groups through: (group, first token, end token) of one; first >= end past the last.

    GROUPS is a power of two >= num_groups. One vector load instead of a search, since no host knows the offsets.
    """
    group = tl.arange(0, GROUPS)
    starts = tl.load(token_offsets_ptr + group, mask=group < num_groups, other=0).to(tl.int32)
    ends = tl.load(token_offsets_ptr + group + 1, mask=group < num_groups, other=0).to(tl.int32)
    tiles = (ends - starts + BLOCK_T - 1) // BLOCK_T
    after = tl.cumsum(tiles, 0)
    found = tl.sum((after <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(group == found, starts + (tile - after + tiles) * BLOCK_T, 0), 0)
    return found, first, tl.sum(tl.where(group == found, ends, 0), 0)


@triton.jit
def _tokens_of_group(token_offsets_ptr, group, num_tokens):
    begin, end = 0, num_tokens
    if token_offsets_ptr is not None:
        begin = tl.load(token_offsets_ptr + group).to(tl.int32)
        end = tl.load(token_offsets_ptr + group + 1).to(tl.int32)
    return begin, end


_DDS_NUMBERS = ["num_tokens", "num_groups", "out_blocks", "in_blocks", "first_pair", "first_offset", "first_order"]


@triton.jit(do_not_specialize=_DDS_NUMBERS)
def dds_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,  # [T, in_blocks * B], [num_slots, B, B], [outputs] or None, [T, out_blocks * B]
    index_ptr, token_offsets_ptr,  # int32: Layout.index; [num_groups + 1] or None
    num_tokens, num_groups, out_blocks, in_blocks,  # blocks of one group if ragged, else of all groups
    first_pair, first_offset, first_order,  # where the index holds the pairs (in int64), offsets and order to walk
    x_stride, y_stride,
    B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    K_MAJOR: tl.constexpr,  # stored blocks are [n, k], as for x Wᵀ, else [k, n]
    GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ, walking the index by rows, or x W, by columns; one program makes BLOCK_T tokens of one output block."""
    # all outputs of a tile of tokens come one after another, so that its x is read from memory once and then from L2
    tile, out = tl.program_id(0) // out_blocks, tl.program_id(0) % out_blocks
    if token_offsets_ptr is None:
        first, end, group = tile * BLOCK_T, num_tokens, 0
        out = tl.load(index_ptr + first_order + out)
    else:
        group, first, end = _tile_of_group(token_offsets_ptr, tile, num_groups, BLOCK_T, GROUPS)
    if first >= end:
        return
    row = group * out_blocks + out
    start, stop = tl.load(index_ptr + first_offset + row), tl.load(index_ptr + first_offset + row + 1)
    pairs = index_ptr.to(tl.pointer_type(tl.int64)) + first_pair

    t, k, n = first + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, B)
    # tokens past the end repeat the last one, which needs no mask in the loop; they are not stored
    x_rows = x_ptr - group * in_blocks * B + tl.minimum(t, end - 1).to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((BLOCK_T, B), tl.float32)
    if BLOCK_K > B:  # several blocks side by side along K; in the last turn some may be missing
        STEP: tl.constexpr = BLOCK_K // B
        x_tile = x_rows + (k % B)[None, :]
        w_tile = weight_ptr + (n[None, :] * B + (k % B)[:, None] if K_MAJOR else (k % B)[:, None] * B + n[None, :])
        pair = k // B
        words = tl.load(pairs + start + pair, mask=start + pair < stop, other=-1)
        for i in range(start, stop, STEP):
            ahead = i + STEP + pair
            following = tl.load(pairs + ahead, mask=ahead < stop, other=-1)
            x = tl.load(x_tile + (words.to(tl.int32) * B)[None, :], mask=(words >= 0)[None, :], other=0.0)
            w = tl.load(w_tile + ((words >> 32) * B * B)[:, None], mask=(words >= 0)[:, None], other=0.0)
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
            words = following
    else:  # a block in one or several parts along K
        PARTS: tl.constexpr = B // BLOCK_K
        x_tile = x_rows + k[None, :]
        w_tile = weight_ptr + (n[None, :] * B + k[:, None] if K_MAJOR else k[:, None] * B + n[None, :])
        word = tl.load(pairs + start, mask=start < stop, other=0)
        for i in range(start * PARTS, stop * PARTS):
            following = tl.load(pairs + (i + 1) // PARTS, mask=i + 1 < stop * PARTS, other=0)
            part = i % PARTS * BLOCK_K
            x = tl.load(x_tile + (word.to(tl.int32) * B + part))
            w = tl.load(w_tile + ((word >> 32) * B * B + (part if K_MAJOR else part * B)))
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
            word = following
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row * B + n).to(tl.float32)[None, :]
    y_tile = y_ptr + t.to(tl.int64)[:, None] * y_stride + (out * B + n)[None, :]
    tl.store(y_tile, sums.to(y_ptr.dtype.element_ty), mask=(t < end)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "out_blocks", "first_pair", "first_offset", "first_order"])
def dds_descriptors_kernel(
    x_desc, weight_desc,  # [T, in_blocks * B] in parts of [BLOCK_T, BLOCK_K], [num_slots * B, B] in parts of a block
    bias_ptr, y_ptr, index_ptr,  # [outputs] or None, [T, out_blocks * B], int32: Layout.index
    num_tokens, out_blocks, first_pair, first_offset, first_order,  # as in dds_kernel
    y_stride,
    B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr,
):  # fmt: skip
    """As dds_kernel, but for ragged groups: a tile of tokens would read beyond its group's end.

    A thread asks for whole tiles, where the other kernel computes an address for every 16 bytes; what lies past the
    last token reads as zero.
    """
    PARTS: tl.constexpr = B // BLOCK_K
    tile, out = tl.program_id(0) // out_blocks, tl.program_id(0) % out_blocks
    row = tl.load(index_ptr + first_order + out)
    start, stop = tl.load(index_ptr + first_offset + row), tl.load(index_ptr + first_offset + row + 1)
    pairs = index_ptr.to(tl.pointer_type(tl.int64)) + first_pair
    sums = tl.zeros((BLOCK_T, B), tl.float32)
    word = tl.load(pairs + start, mask=start < stop, other=0)
    for i in range(start * PARTS, stop * PARTS):
        following = tl.load(pairs + (i + 1) // PARTS, mask=i + 1 < stop * PARTS, other=0)
        part = i % PARTS * BLOCK_K
        col, slot = word.to(tl.int32), (word >> 32).to(tl.int32)
        x = x_desc.load([tile * BLOCK_T, col * B + part])
        if K_MAJOR:
            sums = tl.dot(x, weight_desc.load([slot * B, part]).T, sums)
        else:
            sums = tl.dot(x, weight_desc.load([slot * B + part, 0]), sums)
        word = following
    t, n = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, B)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row * B + n).to(tl.float32)[None, :]
    y_tile = y_ptr + t.to(tl.int64)[:, None] * y_stride + (row * B + n)[None, :]
    tl.store(y_tile, sums.to(y_ptr.dtype.element_ty), mask=(t < num_tokens)[:, None])


@triton.jit
def _row_of_program(row_offsets_ptr, program, num_rows, BLOCKS: tl.constexpr):
    """The last block row r with row_offsets[r] // BLOCKS + r <= program: from there on its BLOCKS pairs are numbered.

    That leaves every row as many numbers as it needs, and spends num_slots // BLOCKS + num_rows + 1 of them in all,
    whatever is live. Counting reads all offsets at once, where a binary search would wait for them one by one.
    """
    row = -1
    for base in range(0, num_rows + 1, 1024):
        r = base + tl.arange(0, 1024)
        begins = tl.load(row_offsets_ptr + r, mask=r <= num_rows, other=0) // BLOCKS + r
        row += tl.sum(((begins <= program) & (r <= num_rows)).to(tl.int32), 0)
    return row


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "num_rows", "num_cols", "num_slots"])
def sdd_kernel(
    dy_ptr, x_ptr, grad_ptr,  # [T, rows * B], [T, cols * B], [SPLITS, num_slots, B, B]
    index_ptr, token_offsets_ptr,  # int32: Layout.index; [num_groups + 1] or None
    num_tokens, num_groups, num_rows, num_cols, num_slots,
    dy_stride, x_stride,
    B: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Live blocks of dyᵀx; one program makes up to BLOCKS blocks of a block row from one of SPLITS parts of the tokens.

    num_groups is 1 unless ragged: with groups side by side, global block coordinates are all there is to know.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    row_offsets_ptr = index_ptr + 4 * num_slots.to(tl.int64)
    row = _row_of_program(row_offsets_ptr, program, num_rows, BLOCKS)
    start = tl.load(row_offsets_ptr + row)
    # one row more than there are holds the dead slots, which get zeros
    stop = tl.load(row_offsets_ptr + row + 1, mask=row < num_rows, other=num_slots)
    start += (program - start // BLOCKS - row) * BLOCKS
    if start >= stop:
        return
    group = tl.minimum(row, num_rows - 1) // (num_rows // num_groups)
    begin, end = _tokens_of_group(token_offsets_ptr, group, num_tokens)
    share = tl.cdiv(end - begin, SPLITS * BLOCK_T) * BLOCK_T
    begin += split * share
    end = tl.where(row < num_rows, tl.minimum(begin + share, end), begin)

    # the columns of several blocks stand side by side on the M side: alone, a block of 16 or 32 would be too small
    m, n, t = tl.arange(0, BLOCKS * B), tl.arange(0, B), begin + tl.arange(0, BLOCK_T)
    pair = start + m // B
    words = tl.load(index_ptr.to(tl.pointer_type(tl.int64)) + pair, mask=pair < stop, other=-1)
    x_cols = (words.to(tl.int32) - group * (num_cols // num_groups)) * B + m % B
    dy_cols = (row - group * (num_rows // num_groups)) * B + n
    x_tile = x_ptr + t.to(tl.int64)[None, :] * x_stride + x_cols[:, None]  # [BLOCKS * B, BLOCK_T]
    dy_tile = dy_ptr + t.to(tl.int64)[:, None] * dy_stride + dy_cols[None, :]  # [BLOCK_T, B]
    sums = tl.zeros((BLOCKS * B, B), tl.float32)
    for _ in range(begin, end, BLOCK_T):
        # both sides are masked, as 0 times what lies past the end may be NaN
        x = tl.load(x_tile, mask=(t < end)[None, :] & (words >= 0)[:, None], other=0.0)
        dy = tl.load(dy_tile, mask=(t < end)[:, None], other=0.0)
        sums = tl.dot(x, dy, sums, input_precision=PRECISION)
        t += BLOCK_T
        x_tile += BLOCK_T * x_stride
        dy_tile += BLOCK_T * dy_stride
    slots = (words >> 32) + split.to(tl.int64) * num_slots
    grad_tile = grad_ptr + (slots * B * B + m % B)[:, None] + (n * B)[None, :]  # the blocks, transposed
    tl.store(grad_tile, sums.to(grad_ptr.dtype.element_ty), mask=(words >= 0)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def sdd_descriptors_kernel(
    dy_desc, x_desc,  # [T, rows * B], [T, cols * B], both in parts of [BLOCK_T, B]
    grad_ptr, index_ptr, block_rows_ptr,  # [SPLITS, num_slots, B, B], int32: Layout.index, int16 or int32 [num_slots]
    num_tokens, num_slots,
    B: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """As sdd_kernel, but for ragged groups; one program makes one block from one of SPLITS parts of the tokens."""
    # in the order of the index, so that the programs that run at once share dy
    word = tl.load(index_ptr.to(tl.pointer_type(tl.int64)) + tl.program_id(0))
    col, slot, split = word.to(tl.int32), (word >> 32).to(tl.int32), tl.program_id(1)
    row = tl.load(block_rows_ptr + slot).to(tl.int32)
    share = tl.cdiv(num_tokens, SPLITS * BLOCK_T) * BLOCK_T
    begin = split * share
    end = tl.where(row >= 0, tl.minimum(begin + share, num_tokens), begin)  # dead slots get zeros and read nothing
    sums = tl.zeros((B, B), tl.float32)
    for t in range(begin, end, BLOCK_T):
        # what lies past the last token reads as zero in both
        sums = tl.dot(dy_desc.load([t, row * B]).T, x_desc.load([t, col * B]), sums)
    m, n = tl.arange(0, B), tl.arange(0, B)
    grad_block = grad_ptr + (slot.to(tl.int64) + split.to(tl.int64) * num_slots) * B * B
    tl.store(grad_block + m[:, None] * B + n[None, :], sums.to(grad_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["size"])
def sum_splits_kernel(parts_ptr, total_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """total [size] = the sum of float32 parts [SPLITS, size], always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * size.to(tl.int64) + i, mask=i < size, other=0.0)
    tl.store(total_ptr + i, total.to(total_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["num_tokens", "rows", "cols"])
def block_norms_kernel(
    dy_ptr, x_ptr, norms_ptr,  # [T, out features], [T, in features], float32 [groups, rows, cols]
    armed_ptr, token_offsets_ptr,  # bool []; [groups + 1] or None
    num_tokens, rows, cols,  # blocks of one group
    dy_stride, x_stride,
    B: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """If armed, add the squared norms of all blocks of dyᵀx; one program makes SIDE x SIDE elements of one group."""
    if not tl.load(armed_ptr):  # on the device, so that a captured step obeys it; what is not armed costs a launch
        return
    group = tl.program_id(2)
    begin, end = _tokens_of_group(token_offsets_ptr, group, num_tokens)
    i, j = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    beside = group if token_offsets_ptr is None else 0  # groups before this one in a row of features
    t = begin + tl.arange(0, BLOCK_T)
    dy_tile = dy_ptr + t.to(tl.int64)[None, :] * dy_stride + (beside * rows * B + i)[:, None]  # [SIDE, BLOCK_T]
    x_tile = x_ptr + t.to(tl.int64)[:, None] * x_stride + (beside * cols * B + j)[None, :]  # [BLOCK_T, SIDE]
    sums = tl.zeros((SIDE, SIDE), tl.float32)
    for _ in range(begin, end, BLOCK_T):
        dy = tl.load(dy_tile, mask=(t < end)[None, :] & (i < rows * B)[:, None], other=0.0)
        x = tl.load(x_tile, mask=(t < end)[:, None] & (j < cols * B)[None, :], other=0.0)
        sums = tl.dot(dy, x, sums, input_precision=PRECISION)
        t += BLOCK_T
        dy_tile += BLOCK_T * dy_stride
        x_tile += BLOCK_T * x_stride
    N: tl.constexpr = SIDE // B
    norms = tl.sum(tl.sum(tl.reshape(sums * sums, (N, B, N, B)), 3), 1)
    r, c = tl.program_id(1) * N + tl.arange(0, N), tl.program_id(0) * N + tl.arange(0, N)
    norms_tile = norms_ptr + (group.to(tl.int64) * rows + r)[:, None] * cols + c[None, :]
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    held = tl.load(norms_tile, mask=inside, other=0.0)
    tl.store(norms_tile, tl.where(held < 0, norms, held + norms), mask=inside)  # negative: nothing was scored yet
