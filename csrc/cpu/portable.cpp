// The kernels in plain C++: for every machine, and what the others are tested against.

#include "kernels.h"

namespace pf {
namespace {

// A block's sixteen values, rounded to `dtype`, as bits.
void rounded_table(const Weight& w, int64_t block, int dtype, uint32_t table[16]) {
    const float absmax = block_absmax(w, block);
    for (int i = 0; i < 16; ++i) {
        const float value = kTables[w.quant_type][i] * absmax;
        if (dtype == PF_BFLOAT16) {
            table[i] = to_bfloat16(value);
        } else if (dtype == PF_FLOAT16) {
            table[i] = to_float16(value);
        } else {
            table[i] = bits_of(value);
        }
    }
}

// The same, widened to float again.
void wide_table(const Weight& w, int64_t block, int dtype, uint32_t table[16]) {
    rounded_table(w, block, dtype, table);
    for (int i = 0; i < 16 && dtype != PF_FLOAT32; ++i) {
        const uint16_t narrow = static_cast<uint16_t>(table[i]);
        table[i] = bits_of(dtype == PF_BFLOAT16 ? from_bfloat16(narrow) : from_float16(narrow));
    }
}

template <typename T>
void dequantize_blocks(const Dequantize& d, int64_t first, int64_t last) {
    const Weight& w = d.weight;
    uint32_t table[16];
    for (int64_t block = first; block < last; ++block) {
        if (sizeof(T) == 2) {
            rounded_table(w, block, d.value_dtype, table);
        } else {
            wide_table(w, block, d.value_dtype, table);
        }
        const int64_t start = block * w.block_size;
        const int64_t count = w.n - start < w.block_size ? w.n - start : w.block_size;
        const uint8_t* in = w.packed + start / 2;
        T* out = static_cast<T*>(d.out) + start;
        for (int64_t i = 0; i + 1 < count; i += 2) {
            out[i] = static_cast<T>(table[in[i / 2] >> 4]);
            out[i + 1] = static_cast<T>(table[in[i / 2] & 15]);
        }
        if (count % 2) out[count - 1] = static_cast<T>(table[in[count / 2] >> 4]);
    }
}

void dequantize(const Dequantize& d, int64_t first, int64_t last) {
    if (d.out_dtype == PF_FLOAT32) {
        dequantize_blocks<uint32_t>(d, first, last);
    } else {
        dequantize_blocks<uint16_t>(d, first, last);
    }
}

template <typename Columns>
void each_group(const Dropout& d, int64_t first, int64_t last, const Columns& columns) {
    const int64_t groups = (d.cols + kGroup - 1) / kGroup;
    for (int64_t row = first; row < last; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
            const uint64_t counter = static_cast<uint64_t>(row * groups + group);
            const int64_t col = group * kGroup;
            const int64_t count = d.cols - col < kGroup ? d.cols - col : kGroup;
            columns(row, col, count, group_mask(d.seed, counter, d.limit));
        }
    }
}

void dropout_mask(const Dropout& d, int64_t first, int64_t last) {
    each_group(d, first, last, [&](int64_t row, int64_t col, int64_t count, unsigned keep) {
        mask_columns(keep, count, static_cast<uint8_t*>(d.out) + row * d.cols + col);
    });
}

template <typename T>
void apply(const Dropout& d, int64_t first, int64_t last) {
    each_group(d, first, last, [&](int64_t row, int64_t col, int64_t count, unsigned keep) {
        const T* in = static_cast<const T*>(d.in) + row * d.in_stride + col;
        apply_columns(keep, count, in, static_cast<T*>(d.out) + row * d.out_stride + col);
    });
}

void dropout_apply(const Dropout& d, int64_t first, int64_t last) {
    if (d.element_size == 2) {
        apply<uint16_t>(d, first, last);
    } else if (d.element_size == 4) {
        apply<uint32_t>(d, first, last);
    } else {
        apply<uint64_t>(d, first, last);
    }
}

bool supported() { return true; }

}  // namespace

const Kernels portable_kernels = {
    "portable", supported, dequantize, dropout_mask, dropout_apply,
};

}  // namespace pf
