// The kernels for x86 with AVX2, FMA and F16C.

#if defined(__x86_64__)

#include <immintrin.h>

#include "target.h"

PF_TARGET_BEGIN("avx2,fma,f16c")

#include "kernels.h"
#include "quantize.h"

namespace pf {
namespace {

// Eight floats, rounded to bfloat16, in the low halves of 32-bit lanes.
inline __m256i bfloat16_bits(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
}

// A block's sixteen values, rounded to 16 bits.
template <int dtype>
inline __m256i narrow_table(__m256 low, __m256 high) {
    if (dtype == PF_FLOAT16) {
        return _mm256_set_m128i(_mm256_cvtps_ph(high, 0), _mm256_cvtps_ph(low, 0));
    }
    const __m256i packed = _mm256_packus_epi32(bfloat16_bits(low), bfloat16_bits(high));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}

// The same, widened to float again.
template <int dtype>
inline __m256 round_to(__m256 value) {
    if (dtype == PF_FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(value, 0));
    if (dtype == PF_BFLOAT16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_bits(value), 16));
    }
    return value;
}

// 64 values of two bytes from 32 packed ones; the table is split in its low and high bytes.
inline void expand_64(__m256i packed, __m256i low_bytes, __m256i high_bytes, __m256i values[4]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i first = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    const __m256i second = _mm256_and_si256(packed, nibble);
    const __m256i first_low = _mm256_shuffle_epi8(low_bytes, first);
    const __m256i first_high = _mm256_shuffle_epi8(high_bytes, first);
    const __m256i second_low = _mm256_shuffle_epi8(low_bytes, second);
    const __m256i second_high = _mm256_shuffle_epi8(high_bytes, second);
    const __m256i first_a = _mm256_unpacklo_epi8(first_low, first_high);
    const __m256i first_b = _mm256_unpackhi_epi8(first_low, first_high);
    const __m256i second_a = _mm256_unpacklo_epi8(second_low, second_high);
    const __m256i second_b = _mm256_unpackhi_epi8(second_low, second_high);
    const __m256i a = _mm256_unpacklo_epi16(first_a, second_a);
    const __m256i b = _mm256_unpackhi_epi16(first_a, second_a);
    const __m256i c = _mm256_unpacklo_epi16(first_b, second_b);
    const __m256i d = _mm256_unpackhi_epi16(first_b, second_b);
    values[0] = _mm256_permute2x128_si256(a, b, 0x20);
    values[1] = _mm256_permute2x128_si256(c, d, 0x20);
    values[2] = _mm256_permute2x128_si256(a, b, 0x31);
    values[3] = _mm256_permute2x128_si256(c, d, 0x31);
}

template <int dtype>
void dequantize_narrow(const Dequantize& d, int64_t first, int64_t last) {
    const Weight& w = d.weight;
    const __m256 low = _mm256_load_ps(kTables[w.quant_type]);
    const __m256 high = _mm256_load_ps(kTables[w.quant_type] + 8);
    const __m256i split = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    for (int64_t block = first; block < last; ++block) {
        const __m256 absmax = _mm256_set1_ps(block_absmax(w, block));
        alignas(32) uint16_t table[16];
        const __m256i narrow =
            narrow_table<dtype>(_mm256_mul_ps(low, absmax), _mm256_mul_ps(high, absmax));
        _mm256_store_si256(reinterpret_cast<__m256i*>(table), narrow);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(narrow, split), 0xd8);
        const __m256i low_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        const __m256i high_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x11);

        const int64_t start = block * w.block_size;
        const int64_t count = w.n - start < w.block_size ? w.n - start : w.block_size;
        const uint8_t* in = w.packed + start / 2;
        uint16_t* out = static_cast<uint16_t*>(d.out) + start;
        __m256i values[4];
        int64_t i = 0;
        for (; i + 64 <= count; i += 64) {
            const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i / 2));
            expand_64(packed, low_bytes, high_bytes, values);
            __m256i* to = reinterpret_cast<__m256i*>(out + i);
            for (int part = 0; part < 4; ++part) _mm256_storeu_si256(to + part, values[part]);
        }
        if (i + 32 <= count) {
            const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i / 2));
            expand_64(_mm256_castsi128_si256(packed), low_bytes, high_bytes, values);
            __m256i* to = reinterpret_cast<__m256i*>(out + i);
            for (int part = 0; part < 2; ++part) _mm256_storeu_si256(to + part, values[part]);
            i += 32;
        }
        for (; i < count; ++i) out[i] = table[in[i / 2] >> (i % 2 ? 0 : 4) & 15];
    }
}

// Eight entries of a table of sixteen floats, by the low four bits of each lane.
inline __m256 look_up(__m256 low, __m256 high, __m256i index) {
    const __m256 from_low = _mm256_permutevar8x32_ps(low, index);
    const __m256 from_high = _mm256_permutevar8x32_ps(high, index);
    const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(from_low, from_high, choice);
}

template <int dtype>
void dequantize_wide(const Dequantize& d, int64_t first, int64_t last) {
    const Weight& w = d.weight;
    const __m256 low = _mm256_load_ps(kTables[w.quant_type]);
    const __m256 high = _mm256_load_ps(kTables[w.quant_type] + 8);
    const __m256i spread = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int64_t block = first; block < last; ++block) {
        const __m256 absmax = _mm256_set1_ps(block_absmax(w, block));
        const __m256 table_low = round_to<dtype>(_mm256_mul_ps(low, absmax));
        const __m256 table_high = round_to<dtype>(_mm256_mul_ps(high, absmax));
        const int64_t start = block * w.block_size;
        const int64_t count = w.n - start < w.block_size ? w.n - start : w.block_size;
        const uint8_t* in = w.packed + start / 2;
        float* out = static_cast<float*>(d.out) + start;
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) {
            int32_t packed;
            memcpy(&packed, in + i / 2, sizeof packed);
            const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(packed), spread);
            _mm256_storeu_ps(out + i, look_up(table_low, table_high, index));
        }
        if (i < count) {
            alignas(32) float table[16];
            _mm256_store_ps(table, table_low);
            _mm256_store_ps(table + 8, table_high);
            for (; i < count; ++i) out[i] = table[in[i / 2] >> (i % 2 ? 0 : 4) & 15];
        }
    }
}

void dequantize(const Dequantize& d, int64_t first, int64_t last) {
    const bool wide = d.out_dtype == PF_FLOAT32;
    if (d.value_dtype == PF_FLOAT32) {
        dequantize_wide<PF_FLOAT32>(d, first, last);
    } else if (d.value_dtype == PF_BFLOAT16) {
        (wide ? dequantize_wide<PF_BFLOAT16> : dequantize_narrow<PF_BFLOAT16>)(d, first, last);
    } else {
        (wide ? dequantize_wide<PF_FLOAT16> : dequantize_narrow<PF_FLOAT16>)(d, first, last);
    }
}

void to_floats(int dtype, const void* in, int64_t count, float* out) {
    if (dtype == PF_FLOAT32) {
        memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const uint16_t* narrow = static_cast<const uint16_t*>(in);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + i));
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
        const __m256 value =
            dtype == PF_FLOAT16 ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(wide);
        _mm256_storeu_ps(out + i, value);
    }
    for (; i < count; ++i) out[i] = load_float(dtype, in, i);
}

void quantize(const Quantize& q, int64_t first, int64_t last) {
    quantize_blocks(q, first, last, to_floats);
}

inline float sum_of(__m256 lanes) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

// Rows m .. m + M of x against row n of W. Blocks may begin and end anywhere in the row.
template <int dtype, int M>
void gemv_row(const Gemv& g, int64_t m, int64_t n) {
    const Weight& w = g.weight;
    const int64_t block_bytes = w.block_size / 2;
    const __m256 low = _mm256_load_ps(kTables[w.quant_type]);
    const __m256 high = _mm256_load_ps(kTables[w.quant_type] + 8);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const RowBytes row = row_bytes(g, n);
    const float* x_even = g.even[row.shifted] + m * g.stride;
    const float* x_odd = g.odd[row.shifted] + m * g.stride;
    __m256 even_sums[M], odd_sums[M];
    for (int r = 0; r < M; ++r) even_sums[r] = odd_sums[r] = _mm256_setzero_ps();
    int64_t block = row.first_byte / block_bytes;
    for (int64_t i = 0; i < row.count; ++block) {
        const int64_t block_end = (block + 1) * block_bytes - row.first_byte;
        const int64_t end = row.count < block_end ? row.count : block_end;
        const __m256 absmax = _mm256_set1_ps(block_absmax(w, block));
        const __m256 table_low = round_to<dtype>(_mm256_mul_ps(low, absmax));
        const __m256 table_high = round_to<dtype>(_mm256_mul_ps(high, absmax));
        for (; i + 8 <= end; i += 8) {
            const __m128i bytes =
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.begin + i));
            const __m256i index = _mm256_cvtepu8_epi32(bytes);
            const __m256 even = look_up(table_low, table_high, _mm256_srli_epi32(index, 4));
            const __m256 odd = look_up(table_low, table_high, index);
            for (int r = 0; r < M; ++r) {
                const int64_t at = r * g.stride + i;
                even_sums[r] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x_even + at), even_sums[r]);
                odd_sums[r] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x_odd + at), odd_sums[r]);
            }
        }
        if (i < end) {
            const int rest = static_cast<int>(end - i);
            uint64_t bytes = 0;
            memcpy(&bytes, row.begin + i, static_cast<size_t>(rest));
            const __m256i index =
                _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
            const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(rest), lanes);
            const __m256 even = look_up(table_low, table_high, _mm256_srli_epi32(index, 4));
            const __m256 odd = look_up(table_low, table_high, index);
            for (int r = 0; r < M; ++r) {
                const int64_t at = r * g.stride + i;
                const __m256 x_e = _mm256_maskload_ps(x_even + at, inside);
                const __m256 x_o = _mm256_maskload_ps(x_odd + at, inside);
                even_sums[r] = _mm256_fmadd_ps(even, x_e, even_sums[r]);
                odd_sums[r] = _mm256_fmadd_ps(odd, x_o, odd_sums[r]);
            }
            i = end;
        }
    }
    for (int r = 0; r < M; ++r) {
        finish(g, m + r, n, sum_of(_mm256_add_ps(even_sums[r], odd_sums[r])));
    }
}

constexpr int64_t kMostRows = 4;

template <int dtype>
void gemv_rows(const Gemv& g, int64_t first, int64_t last) {
    using Row = void (*)(const Gemv&, int64_t, int64_t);
    const Row of[] = {
        gemv_row<dtype, 1>, gemv_row<dtype, 2>, gemv_row<dtype, 3>, gemv_row<dtype, 4>,
    };
    for (int64_t m = 0; m < g.m; m += kMostRows) {
        const int64_t rows = g.m - m < kMostRows ? g.m - m : kMostRows;
        for (int64_t n = first; n < last; ++n) of[rows - 1](g, m, n);
    }
}

void gemv(const Gemv& g, int64_t first, int64_t last) {
    if (g.dtype == PF_BFLOAT16) {
        gemv_rows<PF_BFLOAT16>(g, first, last);
    } else if (g.dtype == PF_FLOAT16) {
        gemv_rows<PF_FLOAT16>(g, first, last);
    } else {
        gemv_rows<PF_FLOAT32>(g, first, last);
    }
}

// Philox for eight counters, in two vectors of 64-bit lanes; `masks` get the 64 elements in order,
// all ones where 16 bits are below the limit: dropped.
inline void dropped_64(uint64_t seed, uint64_t counter, __m256i limit, __m256i masks[4]) {
    const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
    const __m256i base = _mm256_set1_epi64x(static_cast<int64_t>(counter));
    // Unpacking joins even lanes, then odd ones: the counters' order makes up for it.
    const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int v = 0; v < 2; ++v) {
        c0[v] = _mm256_add_epi64(base, _mm256_add_epi64(order, _mm256_set1_epi64x(4 * v)));
        c1[v] = _mm256_srli_epi64(c0[v], 32);
        c2[v] = c3[v] = _mm256_setzero_si256();
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
        for (int v = 0; v < 2; ++v) {
            // Upper halves keep rubbish: the products read the lower ones only.
            const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
            c0[v] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[v], key0));
            c2[v] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[v], key1));
            c1[v] = p1;
            c3[v] = p0;
        }
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    for (int v = 0; v < 2; ++v) {
        const __m256i words0 = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xaa);
        const __m256i words1 = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xaa);
        const __m256i early = _mm256_unpacklo_epi64(words0, words1);
        const __m256i late = _mm256_unpackhi_epi64(words0, words1);
        masks[2 * v] = _mm256_cmpgt_epi16(limit, early);
        masks[2 * v + 1] = _mm256_cmpgt_epi16(limit, late);
    }
}

constexpr int64_t kStep = 64;

void dropout_mask(const Dropout& d, int64_t first, int64_t last) {
    const int64_t groups = (d.cols + kGroup - 1) / kGroup;
    const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(d.limit));
    for (int64_t row = first; row < last; ++row) {
        uint8_t* out = static_cast<uint8_t*>(d.out) + row * d.cols;
        const uint64_t counter = static_cast<uint64_t>(row * groups);
        int64_t col = 0;
        for (; col + kStep <= d.cols; col += kStep) {
            __m256i dropped[4];
            dropped_64(d.seed, counter + static_cast<uint64_t>(col / kGroup), limit, dropped);
            for (int half = 0; half < 2; ++half) {
                const __m256i joined = _mm256_permute4x64_epi64(
                    _mm256_packs_epi16(dropped[2 * half], dropped[2 * half + 1]), 0xd8);
                _mm256_storeu_si256(
                    reinterpret_cast<__m256i*>(out + col + 32 * half),
                    _mm256_andnot_si256(joined, _mm256_set1_epi8(1)));
            }
        }
        for (; col < d.cols; col += kGroup) {
            const int64_t count = d.cols - col < kGroup ? d.cols - col : kGroup;
            const uint64_t group = counter + static_cast<uint64_t>(col / kGroup);
            mask_columns(group_mask(d.seed, group, d.limit), count, out + col);
        }
    }
}

// The masked copy of 16 elements.
inline void keep_16(__m256i dropped, const uint16_t* in, uint16_t* out) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_andnot_si256(dropped, value));
}

inline void keep_16(__m256i dropped, const uint32_t* in, uint32_t* out) {
    for (int half = 0; half < 2; ++half) {
        const __m128i part = half ? _mm256_extracti128_si256(dropped, 1)
                                  : _mm256_castsi256_si128(dropped);
        const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + half);
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out) + half,
            _mm256_andnot_si256(_mm256_cvtepi16_epi32(part), value));
    }
}

inline void keep_16(__m256i dropped, const uint64_t* in, uint64_t* out) {
    for (int quarter = 0; quarter < 4; ++quarter) {
        const __m128i half = quarter / 2 ? _mm256_extracti128_si256(dropped, 1)
                                         : _mm256_castsi256_si128(dropped);
        const __m128i part = quarter % 2 ? _mm_srli_si128(half, 8) : half;
        const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + quarter);
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out) + quarter,
            _mm256_andnot_si256(_mm256_cvtepi16_epi64(part), value));
    }
}

template <typename T>
void apply(const Dropout& d, int64_t first, int64_t last) {
    const int64_t groups = (d.cols + kGroup - 1) / kGroup;
    const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(d.limit));
    for (int64_t row = first; row < last; ++row) {
        const T* in = static_cast<const T*>(d.in) + row * d.in_stride;
        T* out = static_cast<T*>(d.out) + row * d.out_stride;
        const uint64_t counter = static_cast<uint64_t>(row * groups);
        int64_t col = 0;
        for (; col + kStep <= d.cols; col += kStep) {
            __m256i dropped[4];
            dropped_64(d.seed, counter + static_cast<uint64_t>(col / kGroup), limit, dropped);
            for (int part = 0; part < 4; ++part) {
                keep_16(dropped[part], in + col + 16 * part, out + col + 16 * part);
            }
        }
        for (; col < d.cols; col += kGroup) {
            const int64_t count = d.cols - col < kGroup ? d.cols - col : kGroup;
            const uint64_t group = counter + static_cast<uint64_t>(col / kGroup);
            apply_columns(group_mask(d.seed, group, d.limit), count, in + col, out + col);
        }
    }
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

}  // namespace
}  // namespace pf

PF_TARGET_END

namespace pf {
namespace {

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2", supported, dequantize, gemv, quantize, to_floats, dropout_mask, dropout_apply,
};

}  // namespace pf

#endif
