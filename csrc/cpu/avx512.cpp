// The kernels for x86 with AVX-512 (F, BW, VL, DQ).

#if defined(__x86_64__)

#include <immintrin.h>

#include "target.h"

PF_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "kernels.h"
#include "quantize.h"

namespace pf {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

// Sixteen floats, rounded to bfloat16, in the low halves of 32-bit lanes.
inline __m512i bfloat16_bits(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
}

template <int dtype>
inline __m256i narrow(__m512 value) {
    if (dtype == PF_FLOAT16) return _mm512_cvtps_ph(value, kNearest);
    return _mm512_cvtepi32_epi16(bfloat16_bits(value));
}

template <int dtype>
inline __m512 round_to(__m512 value) {
    if (dtype == PF_FLOAT16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, kNearest));
    if (dtype == PF_BFLOAT16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16_bits(value), 16));
    }
    return value;
}

// The index of each of 32 elements from 16 packed bytes, in the low four bits of 16-bit lanes (the
// bits above are rubbish).
inline __m512i indices_32(__m128i packed) {
    const __m512i spread = _mm512_set_epi64(
        0x800f800f800e800e, 0x800d800d800c800c, 0x800b800b800a800a, 0x8009800980088008,
        0x8007800780068006, 0x8005800580048004, 0x8003800380028002, 0x8001800180008000);
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(packed), spread);
    return _mm512_srlv_epi16(bytes, _mm512_set1_epi32(4));
}

template <int dtype>
void dequantize_narrow(const Dequantize& d, int64_t first, int64_t last) {
    const Weight& w = d.weight;
    const __m512 values = _mm512_load_ps(kTables[w.quant_type]);
    for (int64_t block = first; block < last; ++block) {
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(block_absmax(w, block)));
        // Twice the sixteen entries: the fifth bit of an index does not matter.
        const __m512i table = _mm512_broadcast_i64x4(narrow<dtype>(scaled));
        const int64_t start = block * w.block_size;
        const int64_t count = w.n - start < w.block_size ? w.n - start : w.block_size;
        const uint8_t* in = w.packed + start / 2;
        uint16_t* out = static_cast<uint16_t*>(d.out) + start;
        int64_t i = 0;
        for (; i + 32 <= count; i += 32) {
            const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i / 2));
            const __m512i found = _mm512_permutexvar_epi16(indices_32(packed), table);
            _mm512_storeu_si512(out + i, found);
        }
        if (i < count) {
            const unsigned rest = static_cast<unsigned>(count - i);
            const __mmask16 bytes = static_cast<__mmask16>((1u << (rest + 1) / 2) - 1);
            const __m128i packed = _mm_maskz_loadu_epi8(bytes, in + i / 2);
            const __m512i found = _mm512_permutexvar_epi16(indices_32(packed), table);
            _mm512_mask_storeu_epi16(out + i, (1u << rest) - 1, found);
        }
    }
}

// The index of each of 16 elements from 8 packed bytes, in the low four bits of 32-bit lanes.
inline __m512i indices_16(uint64_t packed) {
    const __m512i bytes = _mm512_set1_epi64(static_cast<int64_t>(packed));
    const __m512i spread = _mm512_set_epi64(
        0x8080800780808007, 0x8080800680808006, 0x8080800580808005, 0x8080800480808004,
        0x8080800380808003, 0x8080800280808002, 0x8080800180808001, 0x8080800080808000);
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi64(4));
}

template <int dtype>
void dequantize_wide(const Dequantize& d, int64_t first, int64_t last) {
    const Weight& w = d.weight;
    const __m512 values = _mm512_load_ps(kTables[w.quant_type]);
    for (int64_t block = first; block < last; ++block) {
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(block_absmax(w, block)));
        const __m512 table = round_to<dtype>(scaled);
        const int64_t start = block * w.block_size;
        const int64_t count = w.n - start < w.block_size ? w.n - start : w.block_size;
        const uint8_t* in = w.packed + start / 2;
        float* out = static_cast<float*>(d.out) + start;
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) {
            uint64_t packed;
            memcpy(&packed, in + i / 2, sizeof packed);
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(indices_16(packed), table));
        }
        if (i < count) {
            const unsigned rest = static_cast<unsigned>(count - i);
            uint64_t packed = 0;
            memcpy(&packed, in + i / 2, (rest + 1) / 2);
            const __m512 found = _mm512_permutexvar_ps(indices_16(packed), table);
            _mm512_mask_storeu_ps(out + i, static_cast<__mmask16>((1u << rest) - 1), found);
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
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 inside = first_lanes(count - i);
        const __m256i bits = _mm256_maskz_loadu_epi16(inside, narrow + i);
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        const __m512 value =
            dtype == PF_FLOAT16 ? _mm512_cvtph_ps(bits) : _mm512_castsi512_ps(wide);
        _mm512_mask_storeu_ps(out + i, inside, value);
    }
}

void quantize(const Quantize& q, int64_t first, int64_t last) {
    quantize_blocks(q, first, last, to_floats);
}

// Rows m .. m + M of x against row n of W. Blocks may begin and end anywhere in the row.
template <int dtype, int M>
void gemv_row(const Gemv& g, int64_t m, int64_t n) {
    const Weight& w = g.weight;
    const int64_t block_bytes = w.block_size / 2;
    const __m512 values = _mm512_load_ps(kTables[w.quant_type]);
    const RowBytes row = row_bytes(g, n);
    const float* x_even = g.even[row.shifted] + m * g.stride;
    const float* x_odd = g.odd[row.shifted] + m * g.stride;
    __m512 even_sums[M], odd_sums[M];
    for (int r = 0; r < M; ++r) even_sums[r] = odd_sums[r] = _mm512_setzero_ps();
    int64_t block = row.first_byte / block_bytes;
    for (int64_t i = 0; i < row.count; ++block) {
        const int64_t block_end = (block + 1) * block_bytes - row.first_byte;
        const int64_t end = row.count < block_end ? row.count : block_end;
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(block_absmax(w, block)));
        const __m512 table = round_to<dtype>(scaled);
        for (; i < end; i += 16) {
            const __mmask16 inside = first_lanes(end - i);
            const __m128i bytes = _mm_maskz_loadu_epi8(inside, row.begin + i);
            const __m512i index = _mm512_cvtepu8_epi32(bytes);
            const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table);
            const __m512 odd = _mm512_permutexvar_ps(index, table);
            for (int r = 0; r < M; ++r) {
                const int64_t at = r * g.stride + i;
                const __m512 x_e = _mm512_maskz_loadu_ps(inside, x_even + at);
                const __m512 x_o = _mm512_maskz_loadu_ps(inside, x_odd + at);
                even_sums[r] = _mm512_fmadd_ps(even, x_e, even_sums[r]);
                odd_sums[r] = _mm512_fmadd_ps(odd, x_o, odd_sums[r]);
            }
        }
        i = end;
    }
    for (int r = 0; r < M; ++r) {
        finish(g, m + r, n, _mm512_reduce_add_ps(_mm512_add_ps(even_sums[r], odd_sums[r])));
    }
}

// The same for rows n .. n + N of W that begin with blocks, so that there is nothing to mask. The
// order of the sums is the same.
template <int dtype, int M, int N>
void gemv_aligned(const Gemv& g, int64_t m, int64_t n) {
    const Weight& w = g.weight;
    const int64_t block_bytes = w.block_size / 2, row_bytes = g.k / 2;
    const int64_t blocks = g.k / w.block_size;
    const __m512 values = _mm512_load_ps(kTables[w.quant_type]);
    const uint8_t* packed = w.packed + n * row_bytes;
    const float* x_even = g.even[0] + m * g.stride;
    const float* x_odd = g.odd[0] + m * g.stride;
    __m512 even_sums[M][N], odd_sums[M][N];
    for (int r = 0; r < M; ++r) {
        for (int c = 0; c < N; ++c) even_sums[r][c] = odd_sums[r][c] = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < blocks; ++block) {
        __m512 table[N];
        for (int c = 0; c < N; ++c) {
            const float absmax = block_absmax(w, (n + c) * blocks + block);
            table[c] = round_to<dtype>(_mm512_mul_ps(values, _mm512_set1_ps(absmax)));
        }
        for (int64_t i = block * block_bytes; i < (block + 1) * block_bytes; i += 16) {
            for (int c = 0; c < N; ++c) {
                const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(
                    reinterpret_cast<const __m128i*>(packed + c * row_bytes + i)));
                const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table[c]);
                const __m512 odd = _mm512_permutexvar_ps(index, table[c]);
                for (int r = 0; r < M; ++r) {
                    const __m512 x_e = _mm512_loadu_ps(x_even + r * g.stride + i);
                    const __m512 x_o = _mm512_loadu_ps(x_odd + r * g.stride + i);
                    even_sums[r][c] = _mm512_fmadd_ps(even, x_e, even_sums[r][c]);
                    odd_sums[r][c] = _mm512_fmadd_ps(odd, x_o, odd_sums[r][c]);
                }
            }
        }
    }
    for (int r = 0; r < M; ++r) {
        for (int c = 0; c < N; ++c) {
            const __m512 sums = _mm512_add_ps(even_sums[r][c], odd_sums[r][c]);
            finish(g, m + r, n + c, _mm512_reduce_add_ps(sums));
        }
    }
}

// Rows of W that a tile takes beside M rows of x, so that sums fill registers and hide latency.
constexpr int tile_n(int m) { return m == 1 ? 4 : m <= 4 ? 2 : 1; }

template <int dtype, int M>
void gemv_tile(const Gemv& g, int64_t m, int64_t first, int64_t last) {
    int64_t n = first;
    if (g.k % g.weight.block_size == 0) {
        constexpr int N = tile_n(M);
        for (; n + N <= last; n += N) gemv_aligned<dtype, M, N>(g, m, n);
    }
    for (; n < last; ++n) gemv_row<dtype, M>(g, m, n);
}

constexpr int64_t kMostRows = 8;

template <int dtype>
void gemv_rows(const Gemv& g, int64_t first, int64_t last) {
    using Tile = void (*)(const Gemv&, int64_t, int64_t, int64_t);
    const Tile of[] = {
        gemv_tile<dtype, 1>, gemv_tile<dtype, 2>, gemv_tile<dtype, 3>, gemv_tile<dtype, 4>,
        gemv_tile<dtype, 5>, gemv_tile<dtype, 6>, gemv_tile<dtype, 7>, gemv_tile<dtype, 8>,
    };
    for (int64_t m = 0; m < g.m; m += kMostRows) {
        const int64_t rows = g.m - m < kMostRows ? g.m - m : kMostRows;
        of[rows - 1](g, m, first, last);
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

// Philox for 16 counters, in two vectors of 64-bit lanes; `keep` gets a bit for each of the 128
// elements, in order.
inline void keep_128(uint64_t seed, uint64_t counter, __m512i limit, uint32_t keep[4]) {
    const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
    const __m512i base = _mm512_set1_epi64(static_cast<int64_t>(counter));
    // Unpacking joins even lanes, then odd ones: the counters' order makes up for it.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i c0[2], c1[2], c2[2], c3[2];
    for (int v = 0; v < 2; ++v) {
        c0[v] = _mm512_add_epi64(base, _mm512_add_epi64(order, _mm512_set1_epi64(8 * v)));
        c1[v] = _mm512_srli_epi64(c0[v], 32);
        c2[v] = c3[v] = _mm512_setzero_si512();
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
        for (int v = 0; v < 2; ++v) {
            // Upper halves keep rubbish: the products read the lower ones only.
            const __m512i p0 = _mm512_mul_epu32(c0[v], m0), p1 = _mm512_mul_epu32(c2[v], m1);
            c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[v], key0, 0x96);
            c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[v], key1, 0x96);
            c1[v] = p1;
            c3[v] = p0;
        }
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    for (int v = 0; v < 2; ++v) {
        const __m512i words0 = _mm512_mask_blend_epi32(0xaaaa, c0[v], _mm512_slli_epi64(c1[v], 32));
        const __m512i words1 = _mm512_mask_blend_epi32(0xaaaa, c2[v], _mm512_slli_epi64(c3[v], 32));
        const __m512i early = _mm512_unpacklo_epi64(words0, words1);
        const __m512i late = _mm512_unpackhi_epi64(words0, words1);
        keep[2 * v] = _mm512_cmpge_epi16_mask(early, limit);
        keep[2 * v + 1] = _mm512_cmpge_epi16_mask(late, limit);
    }
}

constexpr int64_t kStep = 128;

// Call columns(row, col, count, keep) on up to 32 columns, whose bits are `keep`'s lowest.
template <typename Columns>
inline void each_32(const Dropout& d, int64_t first, int64_t last, const Columns& columns) {
    const int64_t groups = (d.cols + kGroup - 1) / kGroup;
    const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(d.limit));
    for (int64_t row = first; row < last; ++row) {
        const uint64_t counter = static_cast<uint64_t>(row * groups);
        for (int64_t col = 0; col < d.cols; col += kStep) {
            uint32_t keep[4];
            keep_128(d.seed, counter + static_cast<uint64_t>(col / kGroup), limit, keep);
            for (int part = 0; part < 4; ++part) {
                const int64_t start = col + 32 * part;
                if (start >= d.cols) break;
                columns(row, start, d.cols - start, keep[part]);
            }
        }
    }
}

inline uint32_t lowest(int64_t count) {
    return count >= 32 ? ~uint32_t(0) : (uint32_t(1) << count) - 1;
}

void dropout_mask(const Dropout& d, int64_t first, int64_t last) {
    each_32(d, first, last, [&](int64_t row, int64_t col, int64_t count, uint32_t keep) {
        uint8_t* out = static_cast<uint8_t*>(d.out) + row * d.cols + col;
        _mm256_mask_storeu_epi8(out, lowest(count), _mm256_maskz_set1_epi8(keep, 1));
    });
}

void apply_2(const Dropout& d, int64_t first, int64_t last) {
    each_32(d, first, last, [&](int64_t row, int64_t col, int64_t count, uint32_t keep) {
        const uint16_t* in = static_cast<const uint16_t*>(d.in) + row * d.in_stride + col;
        uint16_t* out = static_cast<uint16_t*>(d.out) + row * d.out_stride + col;
        const uint32_t inside = lowest(count);
        _mm512_mask_storeu_epi16(out, inside, _mm512_maskz_loadu_epi16(keep & inside, in));
    });
}

void apply_4(const Dropout& d, int64_t first, int64_t last) {
    each_32(d, first, last, [&](int64_t row, int64_t col, int64_t count, uint32_t keep) {
        const uint32_t* in = static_cast<const uint32_t*>(d.in) + row * d.in_stride + col;
        uint32_t* out = static_cast<uint32_t*>(d.out) + row * d.out_stride + col;
        const uint32_t inside = lowest(count);
        for (int part = 0; part < 2; ++part) {
            const __mmask16 to = static_cast<__mmask16>(inside >> 16 * part);
            const __mmask16 from = static_cast<__mmask16>(keep >> 16 * part) & to;
            _mm512_mask_storeu_epi32(
                out + 16 * part, to, _mm512_maskz_loadu_epi32(from, in + 16 * part));
        }
    });
}

void apply_8(const Dropout& d, int64_t first, int64_t last) {
    each_32(d, first, last, [&](int64_t row, int64_t col, int64_t count, uint32_t keep) {
        const uint64_t* in = static_cast<const uint64_t*>(d.in) + row * d.in_stride + col;
        uint64_t* out = static_cast<uint64_t*>(d.out) + row * d.out_stride + col;
        const uint32_t inside = lowest(count);
        for (int part = 0; part < 4; ++part) {
            const __mmask8 to = static_cast<__mmask8>(inside >> 8 * part);
            const __mmask8 from = static_cast<__mmask8>(keep >> 8 * part) & to;
            _mm512_mask_storeu_epi64(
                out + 8 * part, to, _mm512_maskz_loadu_epi64(from, in + 8 * part));
        }
    });
}

void dropout_apply(const Dropout& d, int64_t first, int64_t last) {
    const auto apply = d.element_size == 2 ? apply_2 : d.element_size == 4 ? apply_4 : apply_8;
    apply(d, first, last);
}

}  // namespace
}  // namespace pf

PF_TARGET_END

namespace pf {
namespace {

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernels avx512_kernels = {
    "avx512", supported, dequantize, gemv, quantize, to_floats, dropout_mask, dropout_apply,
};

}  // namespace pf

#endif
