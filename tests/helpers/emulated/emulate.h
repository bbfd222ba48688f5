// CUDA C++ on one CPU thread, for tests: each thread of a block is a fiber, and blocks run one after another. Both run
// in random order between barriers. Shared memory is filled with rubbish before every block, its dynamic part with NaN,
// past whose end nothing may be written.
// x86-64 only.
//
// It finds wrong integers, missing barriers that some order of threads makes visible, and deadlocks. It does not find
// races between blocks that run at the same time.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED(type, name)                                         \
    static_assert(sizeof(type) <= sizeof(emulated::Block::shared)); \
    type& name = *reinterpret_cast<type*>(emulated::current->block->shared)

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulated {

struct Barrier {
    int expected = 0, arrived = 0;
    unsigned phase = 0;
};
struct Block {
    alignas(16) char shared[8192];
    Barrier all, warps[32];
    uint64_t lanes[32][32];
    uint32_t registers[32][32][6];  // of every lane, for instructions of a whole warp
};
constexpr unsigned DYNAMIC_BYTES = 232448;  // all that a multiprocessor of compute capability 9.0 has
alignas(128) static unsigned char dynamic_shared[DYNAMIC_BYTES];
static unsigned dynamic_bytes;  // that the launch asked for
static unsigned num_blocks;
static void (*before_block)() = [] {};
struct Fiber {
    void* stack;
    unsigned thread, number;  // of the block
    Block* block;
    bool done;
};

static Fiber* current;
static void* scheduler;
static const std::function<void()>* kernel;

extern "C" void emulated_switch(void** save, void* to);
asm(".text\n.type emulated_switch,@function\nemulated_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n"
    " mov %rsi,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

inline void yield() { emulated_switch(&current->stack, scheduler); }

inline void entry() {
    (*kernel)();
    current->done = true;
    yield();
}

inline void wait(Barrier& barrier) {
    const unsigned phase = barrier.phase;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.phase++;
    } else {
        while (barrier.phase == phase) yield();
    }
}

constexpr size_t STACK_BYTES = 32768;

inline void run_block(unsigned number, int threads, char* stacks, std::mt19937& random) {
    static Block block;
    std::memset(static_cast<void*>(&block), 0xA5, sizeof block);
    std::memset(dynamic_shared, 0xFF, sizeof dynamic_shared);
    before_block();
    block.all = Barrier{threads};
    for (Barrier& warp : block.warps) warp = Barrier{32};
    std::vector<Fiber> fibers(threads);
    std::vector<Fiber*> waiting;
    for (int t = 0; t < threads; t++) {
        void** top = reinterpret_cast<void**>(stacks + (t + 1) * STACK_BYTES - 64);
        top[0] = reinterpret_cast<void*>(entry);  // what emulated_switch returns to
        for (int r = 1; r <= 6; r++) top[-r] = nullptr;
        fibers[t] = {top - 6, unsigned(t), number, &block, false};
        waiting.push_back(&fibers[t]);
    }
    std::shuffle(waiting.begin(), waiting.end(), random);
    for (int rounds = 0; !waiting.empty(); rounds++) {
        for (Fiber* fiber : waiting) {
            current = fiber;
            emulated_switch(&scheduler, fiber->stack);
        }
        waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Fiber* f) { return f->done; }), waiting.end());
        if (rounds > 10'000'000) {
            std::fprintf(stderr, "emulated kernel: threads wait for one another\n");
            std::abort();
        }
    }
    const auto is_written = [](unsigned char byte) { return byte != 0xFF; };
    if (std::any_of(dynamic_shared + dynamic_bytes, dynamic_shared + DYNAMIC_BYTES, is_written)) {
        std::fprintf(stderr, "emulated kernel: block %u wrote past its %u bytes of shared memory\n", number, dynamic_bytes);
        std::abort();
    }
}

inline void launch(const std::function<void()>& body, int blocks, int threads) {
    static std::mt19937 random(1);
    static char* stacks = static_cast<char*>(
        mmap(nullptr, STACK_BYTES * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    kernel = &body;
    num_blocks = unsigned(blocks);
    std::vector<int> order(blocks);
    for (int b = 0; b < blocks; b++) order[b] = b;
    std::shuffle(order.begin(), order.end(), random);
    for (int number : order) run_block(unsigned(number), threads, stacks, random);
}

// A value of another lane of the warp.
template <typename T>
T exchange(T value, int lane) {
    Block& block = *current->block;
    const int warp = int(current->thread >> 5);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    block.lanes[warp][current->thread & 31] = bits;
    wait(block.warps[warp]);
    bits = block.lanes[warp][lane & 31];
    wait(block.warps[warp]);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulated

static struct {
    struct { operator unsigned() const { return emulated::current->thread; } } x;
} threadIdx;
static struct {
    struct { operator unsigned() const { return emulated::current->number; } } x;
} blockIdx;
static struct {
    struct { operator unsigned() const { return emulated::num_blocks; } } x;
} gridDim;

inline void __syncthreads() { emulated::wait(emulated::current->block->all); }
inline void __syncwarp() { emulated::wait(emulated::current->block->warps[emulated::current->thread >> 5]); }
inline void __threadfence() {}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulated::exchange(value, lane);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
    unsigned all = 0;
    emulated::Block& block = *emulated::current->block;
    const unsigned warp = threadIdx.x >> 5;
    block.lanes[warp][threadIdx.x & 31] = yes;
    emulated::wait(block.warps[warp]);
    for (int lane = 0; lane < 32; lane++) all |= unsigned(block.lanes[warp][lane]) << lane;
    emulated::wait(block.warps[warp]);
    return all;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulated::exchange(value, int(threadIdx.x & 31) ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
    const int lane = int(threadIdx.x & 31);
    return emulated::exchange(value, lane >= lanes ? lane - lanes : lane);
}
template <typename T> T __ldcg(const T* place) { return *place; }
template <typename T, typename F> T exchange_at(T* place, F f) { T old = *place; *place = f(old); return old; }
template <typename T> T atomicAdd(T* p, T v) { return exchange_at(p, [&](T x) { return T(x + v); }); }
template <typename T> T atomicOr(T* p, T v) { return exchange_at(p, [&](T x) { return T(x | v); }); }
template <typename T> T atomicAnd(T* p, T v) { return exchange_at(p, [&](T x) { return T(x & v); }); }
template <typename T> T atomicMax(T* p, T v) { return exchange_at(p, [&](T x) { return x > v ? x : v; }); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
