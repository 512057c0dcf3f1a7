// What each instruction set implements, and what the implementations share.
//
// Everything in this header has internal linkage: the files that include it are compiled for
// different instruction sets, and the linker must not take one's copy for another's.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../peftfast.h"

namespace pf {

constexpr int kNestedBlock = 256;

// A 4-bit weight, as in peftfast.h.
struct Weight {
    const uint8_t* packed;
    const void* absmax;
    const float* nested_absmax;
    const float* nested_code;
    const float* offset;
    int64_t n;
    int64_t block_size;
    int quant_type;
};

struct Dequantize {
    Weight weight;
    int value_dtype;
    int out_dtype;
    void* out;
};

// x is given as floats, the elements that meet high half-bytes in `even`, the others in `odd`; a row
// of W that begins in a low half-byte pairs them otherwise, with a zero before the first. Rows are
// `stride` apart, and zeros from their ends on.
struct Gemv {
    Weight weight;
    const float* even[2];
    const float* odd[2];
    int64_t stride;
    int64_t m;
    int64_t n_out;
    int64_t k;
    int dtype;
    const void* bias;
    void* out;  // rows are n_out apart
};

struct Quantize {
    const void* w;
    int dtype;
    int64_t n;
    int64_t block_size;
    int quant_type;
    uint8_t* packed;
    float* absmax;
};

struct Dropout {
    uint64_t seed;
    int limit;
    int64_t rows;
    int64_t cols;
    int element_size;
    const void* in;
    int64_t in_stride;
    void* out;
    int64_t out_stride;
};

struct Kernels {
    const char* name;
    bool (*supported)();
    void (*dequantize)(const Dequantize&, int64_t first_block, int64_t last_block);
    void (*gemv)(const Gemv&, int64_t first_n, int64_t last_n);
    void (*quantize)(const Quantize&, int64_t first_block, int64_t last_block);
    void (*to_floats)(int dtype, const void* in, int64_t count, float* out);
    // keep [rows, cols] as bytes, in `out`; and the masked copy. limit is in (-32768, 32768).
    void (*dropout_mask)(const Dropout&, int64_t first_row, int64_t last_row);
    void (*dropout_apply)(const Dropout&, int64_t first_row, int64_t last_row);
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

const Kernels& kernels();  // those in use

// NF4: quantiles of N(0, 1), normalised to [-1, 1], with an exact zero. FP4: a sign, two bits of
// exponent, one of fraction.
alignas(64) static const float kTables[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f,
     0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
};

// Nested statistics take two roundings; the build forbids contraction into one.
static inline float block_absmax(const Weight& w, int64_t block) {
    if (!w.nested_absmax) return static_cast<const float*>(w.absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(w.absmax)[block];
    return w.nested_code[code] * w.nested_absmax[block / kNestedBlock] + *w.offset;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest, ties to even.
static inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_bfloat16(uint16_t value) {
    return float_of(static_cast<uint32_t>(value) << 16);
}

static inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x1ff));
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
    if (magnitude < 0x38800000) {
        // Below 2^-14 the last bit is worth 2^-24: adding 0.5 lets the adder round to it.
        const float shifted = float_of(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

static inline float from_float16(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    const uint32_t magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + 0x38000000));
    const float scaled = static_cast<float>(magnitude) * float_of(0x33800000);  // 2^-24
    return float_of(sign | bits_of(scaled));
}

static inline int element_size(int dtype) { return dtype == PF_FLOAT32 ? 4 : 2; }

// One float, rounded to `dtype`, and back.
static inline void store_rounded(int dtype, float value, void* out, int64_t i) {
    if (dtype == PF_BFLOAT16) {
        static_cast<uint16_t*>(out)[i] = to_bfloat16(value);
    } else if (dtype == PF_FLOAT16) {
        static_cast<uint16_t*>(out)[i] = to_float16(value);
    } else {
        static_cast<float*>(out)[i] = value;
    }
}

static inline float load_float(int dtype, const void* in, int64_t i) {
    if (dtype == PF_BFLOAT16) return from_bfloat16(static_cast<const uint16_t*>(in)[i]);
    if (dtype == PF_FLOAT16) return from_float16(static_cast<const uint16_t*>(in)[i]);
    return static_cast<const float*>(in)[i];
}

// An output of gemv from its sum.
static inline void finish(const Gemv& g, int64_t m, int64_t n, float sum) {
    if (g.bias) sum += load_float(g.dtype, g.bias, n);
    store_rounded(g.dtype, sum, g.out, m * g.n_out + n);
}

// The bytes of a row of W: where they begin, how many, and whether the first one's high half belongs
// to the row before.
struct RowBytes {
    const uint8_t* begin;
    int64_t first_byte;
    int64_t count;
    int shifted;
};

static inline RowBytes row_bytes(const Gemv& g, int64_t n) {
    const int64_t start = n * g.k;
    const int shifted = static_cast<int>(start & 1);
    return {g.weight.packed + start / 2, start / 2, (g.k + shifted + 1) / 2, shifted};
}

// Philox4x32-7: the rounds' multipliers and the steps of their keys.
constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kGroup = 8;  // columns that one Philox call serves

// One call: two 64-bit numbers that hold the eight 16-bit ones in order.
static inline void philox(uint64_t seed, uint64_t counter, uint64_t words[2]) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c0;
        const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    words[0] = static_cast<uint64_t>(c1) << 32 | c0;
    words[1] = static_cast<uint64_t>(c3) << 32 | c2;
}

// Which of a group's eight elements are kept, lowest bit first.
static inline unsigned group_mask(uint64_t seed, uint64_t counter, int limit) {
    uint64_t words[2];
    philox(seed, counter, words);
    unsigned keep = 0;
    for (int i = 0; i < kGroup; ++i) {
        const int16_t half = static_cast<int16_t>(words[i / 4] >> 16 * (i % 4));
        keep |= static_cast<unsigned>(half >= limit) << i;
    }
    return keep;
}

// The group of a row's last cols % 8 columns, or any of fewer than eight.
static inline void mask_columns(unsigned keep, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = keep >> i & 1;
}

template <typename T>
static inline void apply_columns(unsigned keep, int64_t count, const T* in, T* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = keep >> i & 1 ? in[i] : T(0);
}

}  // namespace pf
