/* A libcuda.so.1 that launches nothing: it notes what it was asked to launch. Built and loaded by test_launches.py. */
#include <stdint.h>

typedef struct { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned num_attributes;
} Config;

struct Record {
    uint64_t function, grid[3], block[3], shared, stream, num_attributes, extended;
    uint64_t parameters[32];
} last[8];
int num_launches;
int num_parameters[256]; /* by function, which is a small number here */
int results[8];          /* of the next launches */
int entered_contexts;
uint64_t encoded[4][16]; /* tensor maps: type, rank, address, 2 sizes, row bytes, 2 sides of a box, swizzle, fill */
int num_encoded;

static int note(struct Record record, void** parameters) {
    for (int p = 0; p < num_parameters[record.function]; p++) record.parameters[p] = *(uint64_t*)parameters[p];
    int result = results[num_launches % 8];
    results[num_launches % 8] = 0;
    last[num_launches++ % 8] = record;
    return result;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void** extra) {
    struct Record record = {(uint64_t)f, {gx, gy, gz}, {bx, by, bz}, shared, (uint64_t)stream, 0, extra != 0, {0}};
    return note(record, parameters);
}
int cuLaunchKernelEx(const Config* c, void* f, void** parameters, void** extra) {
    struct Record record = {(uint64_t)f, {c->grid[0], c->grid[1], c->grid[2]}, {c->block[0], c->block[1], c->block[2]},
                            c->shared, (uint64_t)c->stream, c->num_attributes, 1, {0}};
    return note(record, parameters);
}
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    uint64_t map_of[16] = {type, rank, (uint64_t)address, sizes[0], sizes[1], strides[0], box[0], box[1], swizzle, fill};
    for (int i = 0; i < 16; i++) encoded[num_encoded % 4][i] = ((uint64_t*)map)[i] = map_of[i];
    return num_encoded++, 0;
}
int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { return *value = pointer, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return entered_contexts++, 0; }
int cuGetErrorString(int code, const char** text) { return *text = "the error's own words", 0; }
