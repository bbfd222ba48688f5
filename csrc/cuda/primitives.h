// What the products use of a multiprocessor beyond C++: tensor cores, matrices in shared memory, copies that run while
// the threads compute. Addresses in shared memory are 32-bit numbers. tests/helpers/emulated/primitives.h has the same
// functions for a CPU, lane by lane, so that a wrong lane or a missing wait fails a test.
//
// A copy has a barrier. From compute capability 9.0 on, the copy engine moves a row and counts its bytes; before, lanes
// move 16 bytes at a time, and each tells the barrier when its own have come. The engine is called by one elected lane: for
// a call by any lanes the compiler writes a loop over them, whose turns took 70 clocks each on an H200, whether they moved
// 512 bytes or 2048.
#pragma once
#ifndef SPARSEKERN_EMULATED
#include <cstdint>

#define DEVICE static __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define SHARED(type, name) __shared__ type name

namespace sparsekern {

enum Half : int { BFLOAT16, FLOAT16 };

// ---------------------------------------------------------------------------------------------------- shared memory

DEVICE uint32_t shared_address(const void* place) { return uint32_t(__cvta_generic_to_shared(place)); }

DEVICE int load1(uint32_t from) {
    uint32_t value;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(from));
    return int(value);
}
DEVICE uint32_t load4(uint32_t from) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from));
    return value;
}
DEVICE uint2 load8(uint32_t from) {
    uint2 value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(from));
    return value;
}
DEVICE uint4 load16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

// Matrices of 8 rows of 16 bytes. The lanes 8i .. 8i + 7 bring the addresses of the rows of matrix i. Lane (g, t) gets of
// each the elements (g, 2t) and (g, 2t + 1); transposed, (2t, g) and (2t + 1, g).
DEVICE uint4 matrices4(uint32_t row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row));
    return v;
}
DEVICE uint4 transposed4(uint32_t row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row));
    return v;
}
// The next two keep the value where `wanted` is 0, without a branch; all lanes want the same.
DEVICE void transposed_if(uint4& v, uint32_t row, uint32_t wanted) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
                 "@p ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(row), "r"(wanted));
}
DEVICE void transposed_if(uint2& v, uint32_t row, uint32_t wanted) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n"
                 "@p ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n}"
                 : "+r"(v.x), "+r"(v.y) : "r"(row), "r"(wanted));
}

// ----------------------------------------------------------------------------------------------------- tensor cores

// sums [16, 8] += a [16, 16] b [16, 8]. Lane (g, t) has of the sums (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of
// a, pairs along K from 2t on: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of b (2t, g) and (2t + 8, g).
template <Half TYPE>
DEVICE void multiply_add(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#define SPARSEKERN_MMA(type)                                                                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                  \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
    if constexpr (TYPE == BFLOAT16)
        SPARSEKERN_MMA("bf16");
    else
        SPARSEKERN_MMA("f16");
#undef SPARSEKERN_MMA
}

// Two numbers rounded to 16 bits, the first in the lower half.
template <Half TYPE>
DEVICE uint32_t rounded(float low, float high) {
    uint32_t both;
    if constexpr (TYPE == BFLOAT16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <Half TYPE>
DEVICE float widened(uint16_t bits) {
    if constexpr (TYPE == BFLOAT16) return __uint_as_float(uint32_t(bits) << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// ----------------------------------------------------------------------------- barriers, and copies that tell them

#if __CUDA_ARCH__ >= 900
#define SPARSEKERN_COPY_ENGINE 1
#endif

// A barrier that a warp's copies open (`of_copies`), or one arrival of each of so many warps. By one thread, before
// `barriers_are_made` of the same thread and __syncthreads.
DEVICE void make_barrier_of_copies(uint32_t barrier) {
#ifdef SPARSEKERN_COPY_ENGINE
    const uint32_t arrivals = 1;
#else
    const uint32_t arrivals = 32;
#endif
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void make_barrier_of_warps(uint32_t barrier, int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(warps) : "memory");
}
DEVICE void barriers_are_made() {
#ifdef SPARSEKERN_COPY_ENGINE
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Wait until the barrier has opened for the time whose number has this lowest bit: 0 for the first.
DEVICE void wait_for(uint32_t barrier, uint32_t parity) {
#ifdef SPARSEKERN_COPY_ENGINE
    asm volatile("{\n.reg .pred p;\nagain_%=:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again_%=;\n}"
                 ::"r"(barrier), "r"(parity) : "memory");
#else
    asm volatile("{\n.reg .pred p;\nagain_%=:\nmbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again_%=;\n}"
                 ::"r"(barrier), "r"(parity) : "memory");
#endif
}
// By all lanes of a warp that has read what it waited for.
DEVICE void arrive_as_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

#ifdef SPARSEKERN_COPY_ENGINE
// True in one lane of the warp, of which the compiler knows that it is one.
DEVICE bool is_elected() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
}
#endif

// A warp opens a barrier of copies by calls of all its lanes: `clear_rows`, `announce` with the bytes of all copies to
// come, `copy_rows`, and `close`. Rows are multiples of 16 bytes at such addresses.
DEVICE void announce(uint32_t barrier, uint32_t bytes) {
#ifdef SPARSEKERN_COPY_ENGINE
    __syncwarp();  // rows that other lanes have cleared
    if (is_elected())
        asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}"
                     ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// Rows lie `pitch` bytes apart in shared memory, and `stride` elements of 16 bits where they come from.
DEVICE void copy_rows(
    uint32_t to, uint32_t pitch, const uint16_t* from, int64_t stride, uint32_t bytes, int rows, uint32_t barrier
) {
#ifdef SPARSEKERN_COPY_ENGINE
    if (is_elected()) {
#pragma unroll 8
        for (int row = 0; row < rows; row++, to += pitch, from += stride)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier) : "memory");
    }
    __syncwarp();
#else
    for (int row = 0; row < rows; row++, to += pitch, from += stride)
        for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                         ::"r"(to + at), "l"(__cvta_generic_to_global(reinterpret_cast<const char*>(from) + at)) : "memory");
#endif
}
DEVICE void copy_row(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    copy_rows(to, 0, static_cast<const uint16_t*>(from), 0, bytes, 1, barrier);
}
// Zeros; `readable` is any address that could be copied from.
DEVICE void clear_rows(uint32_t to, uint32_t pitch, const void* readable, uint32_t bytes, int rows) {
    for (int row = 0; row < rows; row++, to += pitch)
        for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512)
#ifdef SPARSEKERN_COPY_ENGINE
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to + at), "r"(0) : "memory");
#else
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 0;"
                         ::"r"(to + at), "l"(__cvta_generic_to_global(readable)) : "memory");
#endif
}
DEVICE void close(uint32_t barrier) {
#ifndef SPARSEKERN_COPY_ENGINE
    __syncwarp();
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

}  // namespace sparsekern
#endif
