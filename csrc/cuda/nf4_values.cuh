// 4-bit weights inside a kernel: the tables, the blocks' scales, rounding.
//
// A table entry is looked up by a shuffle: lane l of every warp keeps entry l % 16, and a shuffle's
// source is taken modulo 32, so an element costs a shift that brings its index to the lowest bits
// (which of the two lanes with that entry answers does not matter, so the bit above needs no mask),
// the shuffle, and the multiplication. A shuffle and a load from shared memory cost the same, 32
// lanes a clock and SM, but the load needs a mask too; selection by byte permutation takes 3
// instructions of the integer pipe (64 lanes a clock and SM) an element.
#pragma once

#include "device.cuh"

namespace pf {

constexpr int kNestedBlock = 256;  // scales that share one scale of their own
constexpr int kCodes = 256;
constexpr int kWarp = 32;
constexpr int kSmallestBlock = 32, kLargestBlock = 4096;

// By pf_quant_type.
PF_CONSTANT float kTables[2][16] = {
    // Quantiles of N(0, 1), normalised to [-1, 1], with an exact zero (Dettmers et al., "QLoRA:
    // Efficient Finetuning of Quantized LLMs", NeurIPS 2023, appendix E).
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    // A sign, two bits of exponent, one of fraction, by twelfths.
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f,
     0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
};

// The place of element `e` among the eight nibbles of a word of four bytes, times four: within a
// byte the earlier element is the high half.
PF_BOTH constexpr int shift_of(int e) { return 4 * (e ^ 1); }

struct Statistics {
    const void* absmax;          // [blocks] of float, or of uint8_t where nested
    const float* nested_absmax;  // null: plain
    const float* nested_code;
    const float* offset;
    int block_shift;  // log2 of the block size
};

// A scale as it lies in memory, so that loads can run ahead of their use.
struct RawScale {
    uint32_t bits;  // a code where nested, else the scale itself
    float outer;    // what nested scales are multiplied with
};

PF_DEVICE RawScale raw_scale(const Statistics& s, int64_t block) {
    RawScale raw{0, 0.0f};
    if (s.nested_absmax) {
        raw.bits = load(static_cast<const uint8_t*>(s.absmax) + block);
        raw.outer = load(s.nested_absmax + block / kNestedBlock);
    } else {
        raw.bits = bits_of(load(static_cast<const float*>(s.absmax) + block));
    }
    return raw;
}

PF_DEVICE float nested_scale(float code_value, float outer, float offset) {
    return add(mul(code_value, outer), offset);
}

// `code_values` is nested_code, from wherever it was copied to.
PF_DEVICE float scale_of(
    const Statistics& s, RawScale raw, const float* code_values, float offset) {
    return s.nested_absmax ? nested_scale(code_values[raw.bits], raw.outer, offset)
                           : float_of(raw.bits);
}

PF_DEVICE float offset_of(const Statistics& s) { return s.nested_absmax ? load(s.offset) : 0.0f; }

// The slow way, all from global memory.
PF_DEVICE float scale_at(const Statistics& s, int64_t block) {
    const RawScale raw = raw_scale(s, block);
    return s.nested_absmax ? nested_scale(load(s.nested_code + raw.bits), raw.outer, load(s.offset))
                           : float_of(raw.bits);
}

// Rounded to a dtype that is known when the kernel runs, as float.
PF_DEVICE float round_to(int dtype, float value) {
    if (dtype == PF_BFLOAT16) {
        return widen<PF_BFLOAT16>(static_cast<uint16_t>(pack<PF_BFLOAT16>(value, 0.0f)));
    }
    if (dtype == PF_FLOAT16) {
        return widen<PF_FLOAT16>(static_cast<uint16_t>(pack<PF_FLOAT16>(value, 0.0f)));
    }
    return value;
}

PF_DEVICE float load_as_float(int dtype, const void* from, int64_t index) {
    if (dtype == PF_FLOAT32) return load(static_cast<const float*>(from) + index);
    const uint16_t narrow = load(static_cast<const uint16_t*>(from) + index);
    return dtype == PF_BFLOAT16 ? widen<PF_BFLOAT16>(narrow) : widen<PF_FLOAT16>(narrow);
}

PF_DEVICE void store_rounded(int dtype, void* to, int64_t index, float value) {
    if (dtype == PF_FLOAT32) {
        store(static_cast<float*>(to) + index, value);
    } else {
        const uint32_t both = dtype == PF_BFLOAT16 ? pack<PF_BFLOAT16>(value, 0.0f)
                                                   : pack<PF_FLOAT16>(value, 0.0f);
        store(static_cast<uint16_t*>(to) + index, static_cast<uint16_t>(both));
    }
}

}  // namespace pf
