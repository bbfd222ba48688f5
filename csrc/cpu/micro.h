// The micro-kernels of one instruction set: the headers below are compiled once per set, in that set's own namespace.
#include "simd.h"
// The others need it first.
#include "dds_kernel.h"
#include "hash_kernel.h"
#include "panel.h"
#include "sdd_kernel.h"

#define SDD_KERNELS(T)                                                                    \
    {                                                                                     \
        {sdd_small<1, 1, T>, sdd_small<1, 2, T>, sdd_small<1, 4, T>, sdd_small<1, 8, T>}, \
        {sdd_small<2, 1, T>, sdd_small<2, 2, T>, sdd_small<2, 4, T>, sdd_small<2, 8, T>}, \
        {sdd_strips<1, T>, sdd_strips<2, T>, sdd_strips<4, T>, sdd_strips<8, T>},         \
    }
#define MICRO_KERNELS(NAME)                                                         \
    {                                                                               \
        NAME,                                                                       \
        LANES,                                                                      \
        {pack<float>, pack<bfloat16>},                                              \
        {unpack<float>, unpack<bfloat16>},                                          \
        {                                                                           \
            {dds_rows<1, 1>, dds_rows<1, 2>, dds_rows<1, 4>, dds_rows<1, 8>},       \
            {dds_rows<2, 1>, dds_rows<2, 2>, dds_rows<2, 4>},                       \
            {dds_rows<4, 1>, dds_rows<4, 2>, LANES > 8 ? dds_rows<4, 4> : nullptr}, \
            {dds_rows<0, 1>, dds_rows<0, 2>},                                       \
        },                                                                          \
        {SDD_KERNELS(float), SDD_KERNELS(bfloat16)},                                \
        hash_keys,                                                                  \
    }
