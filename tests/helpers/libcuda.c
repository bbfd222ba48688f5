/* A libcuda.so.1 that launches nothing: it notes what it was asked to launch. Built and loaded by test_launches.py. */
#include <stdint.h>

typedef struct { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned num_attributes;
} Config;

struct Record {
    uint64_t function, grid[3], block[3], shared, stream, num_attributes, extended;
    uint64_t parameters[32]; /* of a tensor map: how far its address is from a multiple of 64 */
    uint64_t maps[2][16];
} last[8];
int num_launches;
int num_parameters[256]; /* by function, which is a small number here */
unsigned map_places[256]; /* likewise: one bit for each parameter that is a tensor map */
int results[8];          /* of the next launches */
int entered_contexts;
/* Tensor maps: type, rank, address, 2 sizes, row bytes, 2 sides of a box, 2 steps, interleave, swizzle, promotion, fill */
uint64_t encoded[8][16];
int num_encoded;
int encode_results[8]; /* of the next ones */
int driver_version;

static int note(struct Record record, void** parameters) {
    for (int p = 0, maps = 0; p < num_parameters[record.function]; p++) {
        uint64_t* words = parameters[p];
        int is_map = map_places[record.function] >> p & 1;
        record.parameters[p] = is_map ? (uint64_t)words % 64 : *words;
        for (int i = 0; is_map && i < 16; i++) record.maps[maps][i] = words[i];
        maps += is_map;
    }
    int result = results[num_launches % 8];
    results[num_launches % 8] = 0;
    last[num_launches++ % 8] = record;
    return result;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void** extra) {
    struct Record record = {(uint64_t)f, {gx, gy, gz}, {bx, by, bz}, shared, (uint64_t)stream, 0, extra != 0, {0}, {{0}}};
    return note(record, parameters);
}
int cuLaunchKernelEx(const Config* c, void* f, void** parameters, void** extra) {
    struct Record record = {(uint64_t)f, {c->grid[0], c->grid[1], c->grid[2]}, {c->block[0], c->block[1], c->block[2]},
                            c->shared, (uint64_t)c->stream, c->num_attributes, 1, {0}, {{0}}};
    return note(record, parameters);
}
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    uint64_t words[16] = {type,   rank,     (uint64_t)address, sizes[0],   sizes[1], strides[0], box[0],
                          box[1], steps[0], steps[1],          interleave, swizzle,  promotion,  fill};
    int result = encode_results[num_encoded % 8];
    encode_results[num_encoded % 8] = 0;
    for (int i = 0; i < 16; i++) encoded[num_encoded % 8][i] = words[i];
    words[1] |= 1 << 21; /* what drivers up to 13.1 do wrong for small tensors */
    for (int i = 0; i < 16; i++) ((uint64_t*)map)[i] = words[i];
    return num_encoded++, result;
}
int cuDriverGetVersion(int* version) { return *version = driver_version, 0; }
int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { return *value = pointer, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return entered_contexts++, 0; }
int cuGetErrorString(int code, const char** text) { return *text = "the error's own words", 0; }
