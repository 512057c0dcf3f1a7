// The kernels in plain C++: for every machine, and what the others are tested against.

#include "kernels.h"
#include "quantize.h"

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

constexpr int64_t kTile = 256;  // bytes of a row that are decoded at a time
constexpr int kLanes = 8;
constexpr int64_t kMostRows = 8;

// Up to kMostRows rows of x, from row m on, against row n of W.
void gemv_row(const Gemv& g, int64_t m, int64_t rows, int64_t n) {
    const Weight& w = g.weight;
    const int64_t block_bytes = w.block_size / 2;
    const RowBytes row = row_bytes(g, n);
    alignas(64) float even[kTile], odd[kTile];
    alignas(64) float sums[kMostRows][kLanes] = {};
    for (int64_t i = 0; i < row.count;) {
        const int64_t byte = row.first_byte + i;
        const int64_t block = byte / block_bytes;
        const int64_t in_block = (block + 1) * block_bytes - byte;
        int64_t count = row.count - i < in_block ? row.count - i : in_block;
        count = count < kTile ? count : kTile;
        uint32_t table[16];
        wide_table(w, block, g.dtype, table);
        for (int64_t j = 0; j < count; ++j) {
            even[j] = float_of(table[row.begin[i + j] >> 4]);
            odd[j] = float_of(table[row.begin[i + j] & 15]);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float* x_even = g.even[row.shifted] + (m + r) * g.stride + i;
            const float* x_odd = g.odd[row.shifted] + (m + r) * g.stride + i;
            int64_t j = 0;
            for (; j + kLanes <= count; j += kLanes) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    sums[r][lane] += even[j + lane] * x_even[j + lane];
                    sums[r][lane] += odd[j + lane] * x_odd[j + lane];
                }
            }
            for (; j < count; ++j) {
                sums[r][0] += even[j] * x_even[j];
                sums[r][0] += odd[j] * x_odd[j];
            }
        }
        i += count;
    }
    for (int64_t r = 0; r < rows; ++r) {
        float sum = 0;
        for (float lane : sums[r]) sum += lane;
        finish(g, m + r, n, sum);
    }
}

void gemv(const Gemv& g, int64_t first, int64_t last) {
    for (int64_t m = 0; m < g.m; m += kMostRows) {
        const int64_t rows = g.m - m < kMostRows ? g.m - m : kMostRows;
        for (int64_t n = first; n < last; ++n) gemv_row(g, m, rows, n);
    }
}

void to_floats(int dtype, const void* in, int64_t count, float* out) {
    if (dtype == PF_FLOAT32) {
        memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const uint16_t* narrow = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < count; ++i) {
        out[i] = dtype == PF_BFLOAT16 ? from_bfloat16(narrow[i]) : from_float16(narrow[i]);
    }
}

void quantize(const Quantize& q, int64_t first, int64_t last) {
    quantize_blocks(q, first, last, to_floats);
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
    "portable", supported, dequantize, gemv, quantize, to_floats, dropout_mask, dropout_apply,
};

}  // namespace pf
