// csrc/cuda/primitives.h on a CPU: the same functions, lane by lane.
//
// A copy moves nothing until somebody waits for a barrier, and then one at a time in random order, so that who reads
// without waiting finds NaN or older data. Addresses are checked: inside shared memory, and multiples of what is moved.
#pragma once
#include "emulate.h"

#define SPARSEKERN_EMULATED
#define DEVICE static inline
#define DYNAMIC_SHARED(name) unsigned char* const name = emulated::dynamic_shared

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel, thread %u of block %u: %s\n", current->thread, current->number, what);
    std::abort();
}

// Shared addresses: first the block's static part, then the dynamic one.
constexpr uint32_t DYNAMIC_FIRST = 1 << 20;
inline unsigned char* place_of(uint32_t address, uint32_t bytes, uint32_t alignment) {
    if (address % alignment) fail("an address in shared memory is not aligned");
    if (address >= DYNAMIC_FIRST) {
        if (address - DYNAMIC_FIRST + bytes > dynamic_bytes) fail("an address is past the end of shared memory");
        return dynamic_shared + (address - DYNAMIC_FIRST);
    }
    if (address + bytes > sizeof current->block->shared) fail("an address is outside of shared memory");
    return reinterpret_cast<unsigned char*>(current->block->shared) + address;
}

// What all lanes of the warp have put down before any of them reads it.
using Registers = uint32_t[32][6];
template <typename... Words>
Registers& together(Words... words) {
    Block& block = *current->block;
    const unsigned warp = current->thread >> 5;
    uint32_t* own = block.registers[warp][current->thread & 31];
    ((*own++ = words), ...);
    wait(block.warps[warp]);
    return block.registers[warp];
}
inline void apart() { wait(current->block->warps[current->thread >> 5]); }

// An mbarrier in its 8 bytes.
struct CopyBarrier {
    int32_t bytes;  // announced and not yet copied
    uint8_t expected, arrived, opened, padding;

    void look() {
        if (arrived < expected || bytes) return;
        arrived = 0;
        opened++;
    }
};
static_assert(sizeof(CopyBarrier) == 8);
inline CopyBarrier& copy_barrier(uint32_t address) { return *reinterpret_cast<CopyBarrier*>(place_of(address, 8, 8)); }

struct Copy {
    uint32_t to;
    const void* from;
    uint32_t bytes, barrier;
};
static std::vector<Copy> under_way;
static std::mt19937 copies_random(2);
static const bool copies_start_afresh = (before_block = [] { under_way.clear(); }, true);

inline void finish_one_copy() {
    if (under_way.empty()) return;
    std::swap(under_way[copies_random() % under_way.size()], under_way.back());
    const Copy done = under_way.back();
    under_way.pop_back();
    std::memcpy(place_of(done.to, done.bytes, 16), done.from, done.bytes);
    CopyBarrier& barrier = copy_barrier(done.barrier);
    barrier.bytes -= int32_t(done.bytes);
    barrier.look();
}

}  // namespace emulated

namespace sparsekern {

enum Half : int { BFLOAT16, FLOAT16 };

DEVICE uint32_t shared_address(const void* place) {
    const auto* byte = static_cast<const unsigned char*>(place);
    if (byte >= emulated::dynamic_shared && byte < emulated::dynamic_shared + emulated::DYNAMIC_BYTES)
        return emulated::DYNAMIC_FIRST + uint32_t(byte - emulated::dynamic_shared);
    return uint32_t(byte - reinterpret_cast<const unsigned char*>(emulated::current->block->shared));
}

template <typename T>
T loaded(uint32_t from) {
    T value;
    std::memcpy(&value, emulated::place_of(from, sizeof value, sizeof value), sizeof value);
    return value;
}
DEVICE int load1(uint32_t from) { return loaded<uint8_t>(from); }
DEVICE uint32_t load4(uint32_t from) { return loaded<uint32_t>(from); }
DEVICE uint2 load8(uint32_t from) { return loaded<uint2>(from); }
DEVICE uint4 load16(uint32_t from) { return loaded<uint4>(from); }

template <int COUNT>
DEVICE void read_matrices(uint32_t (&values)[COUNT], uint32_t row, bool transposed) {
    const unsigned g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
    emulated::Registers& rows = emulated::together(row);
    const auto element = [&](int matrix, unsigned i, unsigned j) {
        uint16_t bits;
        std::memcpy(&bits, emulated::place_of(rows[8 * matrix + i][0], 16, 16) + 2 * j, 2);
        return uint32_t(bits);
    };
    for (int m = 0; m < COUNT; m++)
        values[m] = transposed ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                               : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
    emulated::apart();
}
DEVICE uint4 matrices4(uint32_t row) {
    uint32_t v[4];
    read_matrices(v, row, false);
    return {v[0], v[1], v[2], v[3]};
}
DEVICE uint4 transposed4(uint32_t row) {
    uint32_t v[4];
    read_matrices(v, row, true);
    return {v[0], v[1], v[2], v[3]};
}
DEVICE void transposed_if(uint4& v, uint32_t row, uint32_t wanted) {
    if (wanted) v = transposed4(row);
}
DEVICE void transposed_if(uint2& v, uint32_t row, uint32_t wanted) {
    if (!wanted) return;
    uint32_t both[2];
    read_matrices(both, row, true);
    v = {both[0], both[1]};
}

template <Half TYPE>
DEVICE float widened(uint16_t bits) {
    float value;
    uint32_t wide = uint32_t(bits) << 16;
    if (TYPE == FLOAT16) {
        const uint32_t magnitude = bits & 0x7fffu, sign = uint32_t(bits & 0x8000u) << 16;
        wide = sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : magnitude << 13);
        std::memcpy(&value, &wide, 4);
        return magnitude >= 0x7c00u ? value : value * 0x1p112f;
    }
    std::memcpy(&value, &wide, 4);
    return value;
}

// To the nearest, ties to even.
template <Half TYPE>
DEVICE uint32_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fffu;
    if (TYPE == BFLOAT16) return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on
    if (magnitude < 0x38800000u) {                        // subnormal: add what makes the lowest bit 2^-24
        float plain;
        std::memcpy(&plain, &magnitude, 4);
        plain += 0.5f;
        uint32_t shifted;
        std::memcpy(&shifted, &plain, 4);
        return sign | (shifted - 0x3f000000u);
    }
    return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}
template <Half TYPE>
DEVICE uint32_t rounded(float low, float high) {
    return rounded<TYPE>(low) | rounded<TYPE>(high) << 16;
}

template <Half TYPE>
DEVICE void multiply_add(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    const int g = int(threadIdx.x & 31) / 4, t = int(threadIdx.x) % 4;
    emulated::Registers& all = emulated::together(a.x, a.y, a.z, a.w, b0, b1);
    // a: word 0 (rows 0-7, k 0-7), 1 (rows 8-15, k 0-7), 2 (rows 0-7, k 8-15), 3; b: word 4 (k 0-7), 5 (k 8-15)
    const auto half = [](uint32_t word, int k) { return widened<TYPE>(uint16_t(k % 2 ? word >> 16 : word)); };
    for (int k = 0; k < 16; k++) {
        const int lane = k % 8 / 2, words = k / 8;
        const float low = half(all[4 * g + lane][2 * words], k), high = half(all[4 * g + lane][2 * words + 1], k);
        for (int c = 0; c < 2; c++) {
            const float b = half(all[4 * (2 * t + c) + lane][4 + words], k);
            d[c] += low * b;
            d[2 + c] += high * b;
        }
    }
    emulated::apart();
}

DEVICE void make_barrier_of_copies(uint32_t barrier) { emulated::copy_barrier(barrier) = {0, 1, 0, 0, 0}; }
DEVICE void make_barrier_of_warps(uint32_t barrier, int warps) {
    emulated::copy_barrier(barrier) = {0, uint8_t(warps), 0, 0, 0};
}
DEVICE void barriers_are_made() {}
DEVICE void wait_for(uint32_t barrier, uint32_t parity) {
    while ((emulated::copy_barrier(barrier).opened & 1) == parity) {
        emulated::finish_one_copy();
        emulated::yield();
    }
}
DEVICE void arrive_as_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32) return;
    emulated::copy_barrier(barrier).arrived++;
    emulated::copy_barrier(barrier).look();
}
DEVICE void announce(uint32_t barrier, uint32_t bytes) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        emulated::copy_barrier(barrier).bytes += int32_t(bytes);
        emulated::copy_barrier(barrier).arrived++;
        emulated::copy_barrier(barrier).look();
    }
    __syncwarp();
}
DEVICE void copy_rows(
    uint32_t to, uint32_t pitch, const uint16_t* from, int64_t stride, uint32_t bytes, int rows, uint32_t barrier
) {
    if (threadIdx.x % 32) return;
    for (int row = 0; row < rows; row++, to += pitch, from += stride) {
        if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a copied row is not of whole 16 bytes");
        emulated::place_of(to, bytes, 16);
        emulated::under_way.push_back({to, from, bytes, barrier});
    }
}
DEVICE void copy_row(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    copy_rows(to, 0, static_cast<const uint16_t*>(from), 0, bytes, 1, barrier);
}
DEVICE void clear_rows(uint32_t to, uint32_t pitch, const void*, uint32_t bytes, int rows) {
    for (int row = 0; row < rows; row++, to += pitch)
        for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512)
            std::memset(emulated::place_of(to + at, 16, 16), 0, 16);
}
DEVICE void close(uint32_t) {}

}  // namespace sparsekern
