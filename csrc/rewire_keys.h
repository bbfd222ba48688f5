// The integers that decide a rewire, once for every device: how norms, hashes and gradient scores become sortable keys.
// sparsekern/rewire/scores.py, hash.py and growth.py are the same in torch operations.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPARSEKERN_SHARED __host__ __device__ __forceinline__
#else
#define SPARSEKERN_SHARED inline
#endif

namespace sparsekern {

enum ElementType : int32_t { ELEMENT_FLOAT32, ELEMENT_FLOAT16, ELEMENT_BFLOAT16 };

SPARSEKERN_SHARED uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
#endif
}

SPARSEKERN_SHARED float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

// |x| of a 16-bit number, exactly.
SPARSEKERN_SHARED float absolute16(uint32_t bits, bool bfloat16) {
    bits &= 0x7fffu;
    if (bfloat16) return float_of_bits(bits << 16);
    // float16: move the exponent by 112; this is exact for subnormal numbers too
    return bits >= 0x7c00u ? float_of_bits(0x7f800000u | bits << 13) : float_of_bits(bits << 13) * 0x1p112f;
}

SPARSEKERN_SHARED float absolute(float value) { return float_of_bits(bits_of_float(value) & 0x7fffffffu); }

// Drop: the smallest key is the weakest block. NaN counts as -inf, -0 as 0.
constexpr uint32_t DROP_KEY_OF_NAN = 0x007fffffu;
constexpr uint32_t DROP_KEY_OF_ZERO = 0x80000000u;

SPARSEKERN_SHARED uint32_t drop_key(float score) {
    uint32_t bits = bits_of_float(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
    if (bits == 0x80000000u) bits = 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The output of splitmix64, and its step from one state to the next.
constexpr uint64_t SPLITMIX_STEP = 0x9E3779B97F4A7C15ull;

SPARSEKERN_SHARED uint64_t splitmix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The stream of (keys..., key), where `stream` is that of the keys before: see sparsekern/rewire/hash.py.
SPARSEKERN_SHARED uint64_t continued_stream(uint64_t stream, uint64_t key) {
    return splitmix(stream + (key + 1) * SPLITMIX_STEP);
}

// Grow: the smallest key is the best place. SET: the complement of 31 bits of splitmix64(start + position).
constexpr uint32_t GROW_KEYS_BY_HASH = 0x80000000u;

SPARSEKERN_SHARED uint32_t grow_key_by_hash(uint64_t start, uint64_t position) {
    return 0x7fffffffu - uint32_t(splitmix(position * SPLITMIX_STEP + start) >> 33);
}

// RigL: the complement of the score's bits. Negative and non-finite scores are no candidates.
constexpr uint32_t GROW_KEY_OF_ZERO = 0x7f7fffffu;
constexpr uint32_t NO_CANDIDATE = 0xffffffffu;

SPARSEKERN_SHARED uint32_t grow_key_by_score(float score) {
    const uint32_t bits = bits_of_float(score + 0.0f);  // -0 becomes 0
    return bits > GROW_KEY_OF_ZERO ? NO_CANDIDATE : GROW_KEY_OF_ZERO - bits;
}

}  // namespace sparsekern
