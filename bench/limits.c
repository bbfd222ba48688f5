// What one core can do at most: multiply-adds of vectors in registers, and nothing else. bench/limits.py compiles it for
// the machine that it runs on.
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
// Two units of latency 4 take 8; with both constants, 16 registers are enough for 12.
#define CHAINS 12

typedef float Vec __attribute__((vector_size(BYTES)));

float multiply_add(long turns) {
    Vec chains[CHAINS], factor = {0}, summand = {0}, sum = {0};
    factor += 0.999f, summand += 0.001f;
    for (int i = 0; i < CHAINS; i++) chains[i] = sum + (float)i;
    for (long turn = 0; turn < turns; turn++)
        for (int i = 0; i < CHAINS; i++) chains[i] = chains[i] * factor + summand;
    for (int i = 0; i < CHAINS; i++) sum += chains[i];
    return sum[0];
}

long flop(long turns) { return turns * CHAINS * (long)(BYTES / sizeof(float)) * 2; }
