// Quantising blocks to 4 bits, by the rules of bitsandbytes on a CPU. Plain loops, which the compiler
// vectorises for the instruction set of the file that includes this.
#pragma once

#include "kernels.h"

namespace pf {

// The sixteen indices in the order of their values.
static const uint8_t kOrder[2][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
};
constexpr float kSmallest = 1e-38f;
constexpr int64_t kLargestBlock = 4096;

// The largest magnitude; NaN where there is one, whose bits are above infinity's.
static inline float largest_magnitude(const float* values, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(largest);
}

template <typename ToFloats>
static inline void quantize_blocks(
    const Quantize& q, int64_t first, int64_t last, const ToFloats& to_floats) {
    const uint8_t* order = kOrder[q.quant_type];
    const float* table = kTables[q.quant_type];
    float bounds[15];
    for (int j = 0; j < 15; ++j) bounds[j] = (table[order[j]] + table[order[j + 1]]) / 2;
    alignas(64) float values[kLargestBlock + 1];
    alignas(64) uint32_t ranks[kLargestBlock + 1];
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * q.block_size;
        const int64_t rest = q.n - start;
        const int64_t count = rest < q.block_size ? rest : q.block_size;
        const char* in = static_cast<const char*>(q.w) + start * element_size(q.dtype);
        to_floats(q.dtype, in, count, values);
        const float absmax = largest_magnitude(values, count);
        const float positive = absmax < kSmallest ? kSmallest : absmax;
        if (count == q.block_size) {
            q.absmax[block] = absmax;
            const float inverse = 1.0f / positive;
            for (int64_t i = 0; i < count; ++i) values[i] *= inverse;
        } else {
            q.absmax[block] = positive;
            for (int64_t i = 0; i < count; ++i) values[i] /= positive;
        }
        const int64_t padded = count + count % 2;
        values[padded - 1] = count % 2 ? 0.0f : values[padded - 1];
        for (int64_t i = 0; i < padded; ++i) {
            uint32_t rank = 0;
            for (int j = 0; j < 15; ++j) rank += !(bounds[j] >= values[i]);
            ranks[i] = rank;
        }
        uint8_t* out = q.packed + start / 2;
        for (int64_t i = 0; i < padded; i += 2) {
            out[i / 2] = static_cast<uint8_t>(order[ranks[i]] << 4 | order[ranks[i + 1]]);
        }
    }
}

}  // namespace pf
