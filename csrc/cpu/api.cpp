// The C interface: checks, the choice of kernels, the split into parallel work.

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "kernels.h"
#include "parallel.h"

namespace pf {
namespace {

// The least work worth a thread, in elements that are written: some ten microseconds.
constexpr int64_t kDequantizeGrain = 1 << 15;
constexpr int64_t kQuantizeGrain = 1 << 13;
constexpr int64_t kDropoutGrain = 1 << 14;
constexpr int64_t kGemvGrain = 1 << 16;  // multiplications, at one row of x
constexpr int64_t kGemvRows = 64;  // rows of x that are converted at a time

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &avx512_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};
const char* const kNames[] = {"avx512", "avx2", "portable"};

const Kernels& best() {
    for (const Kernels* candidate : kAll) {
        if (candidate->supported()) return *candidate;
    }
    return portable_kernels;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> pointer{&best()};
    return pointer;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool good_weight(const Weight& w) {
    const bool nested = w.nested_absmax || w.nested_code || w.offset;
    if (nested && !(w.nested_absmax && w.nested_code && w.offset)) return false;
    if (w.n < 0 || (w.quant_type != PF_NF4 && w.quant_type != PF_FP4)) return false;
    if (w.block_size < 32 || w.block_size > 4096 || (w.block_size & (w.block_size - 1))) return false;
    return w.n == 0 || (w.packed && w.absmax);
}

// x's rows as floats, split as struct Gemv says.
class SplitRows {
   public:
    SplitRows(int64_t rows, int64_t k) : k_(k), stride_(ceil_div(k + 1, 32) * 16) {
        const size_t buffers = k % 2 ? 4 : 2;
        const size_t floats = static_cast<size_t>(rows * stride_) * buffers;
        const size_t bytes = (floats + static_cast<size_t>(2 * stride_)) * sizeof(float);
        memory_ = static_cast<float*>(aligned_alloc(64, bytes));
        if (!memory_) return;
        memset(memory_, 0, bytes);
        const int64_t size = rows * stride_;
        for (int shifted = 0; shifted < 2; ++shifted) {
            even[shifted] = memory_ + (k % 2 ? shifted * 2 * size : 0);
            odd[shifted] = even[shifted] + size;
        }
        row_ = memory_ + floats;
    }
    SplitRows(const SplitRows&) = delete;
    SplitRows& operator=(const SplitRows&) = delete;
    ~SplitRows() { free(memory_); }

    bool allocated() const { return memory_; }
    int64_t stride() const { return stride_; }

    void fill(int dtype, const void* x, int64_t rows) {
        if (k_ == 0) return;
        const auto to_floats = kernels().to_floats;
        for (int64_t r = 0; r < rows; ++r) {
            to_floats(dtype, static_cast<const char*>(x) + r * k_ * element_size(dtype), k_, row_);
            row_[k_] = 0;
            split(row_, (k_ + 1) / 2, even[0] + r * stride_, odd[0] + r * stride_);
            if (k_ % 2) {
                odd[1][r * stride_] = row_[0];
                split(row_ + 1, k_ / 2, even[1] + r * stride_ + 1, odd[1] + r * stride_ + 1);
            }
        }
    }

    float* even[2];
    float* odd[2];

   private:
    static void split(const float* row, int64_t pairs, float* first, float* second) {
        for (int64_t i = 0; i < pairs; ++i) {
            first[i] = row[2 * i];
            second[i] = row[2 * i + 1];
        }
    }

    int64_t k_;
    int64_t stride_;
    float* memory_;
    float* row_;
};

// Statistics in blocks of 256, to 8 bits.
void quantize_nested_block(
    const float* values, const float* code, int64_t count, uint8_t* codes, float* absmax) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float magnitude = float_of(bits_of(values[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    *absmax = largest;
    if (largest == 0) {
        memset(codes, 0, static_cast<size_t>(count));
        return;
    }
    const float inverse = 1.0f / largest;
    for (int64_t i = 0; i < count; ++i) {
        float scaled = values[i] * inverse;
        scaled = scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
        if (scaled != scaled) {
            codes[i] = 0;
            continue;
        }
        // bitsandbytes looks the code up on a grid of 65,536 points. The product and the sum are
        // exact in double, so there is one rounding, as in the fused operation that it uses.
        const double halved = (scaled + 1.0f) * 0.5f;
        const int point = static_cast<int>(static_cast<float>(halved * 65535 + 0.5)) & 0xffff;
        const float on_grid = -1.0f + 2.0f * static_cast<float>(point) / 65535;
        int below = 0;  // midpoints below on_grid: a search among 255 of them
        for (int step = 128; step; step /= 2) {
            const float midpoint = 0.5f * (code[below + step - 1] + code[below + step]);
            below += midpoint < on_grid ? step : 0;
        }
        codes[i] = static_cast<uint8_t>(below);
    }
}

bool value_dtype(int dtype) {
    return dtype == PF_FLOAT32 || dtype == PF_FLOAT16 || dtype == PF_BFLOAT16;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace pf

using namespace pf;

int pf_cpu_abi(void) { return PF_CPU_ABI; }

const char* pf_cpu_isa(void) { return kernels().name; }

const char* pf_cpu_best_isa(void) { return best().name; }

int pf_cpu_use_isa(const char* name) {
    if (!name) {
        chosen().store(&best());
        return PF_OK;
    }
    for (const Kernels* candidate : kAll) {
        if (strcmp(candidate->name, name) == 0) {
            if (!candidate->supported()) return PF_UNSUPPORTED_ISA;
            chosen().store(candidate);
            return PF_OK;
        }
    }
    for (const char* known : kNames) {
        if (strcmp(known, name) == 0) return PF_UNSUPPORTED_ISA;
    }
    return PF_UNKNOWN_ISA;
}

const char* pf_cpu_threading(void) { return threading(); }

int pf_cpu_nf4_dequantize(
    const uint8_t* packed, const void* absmax, const float* nested_absmax, const float* nested_code,
    const float* offset, int64_t n, int block_size, int quant_type, int value, int out_dtype,
    void* out, int threads) {
    const Dequantize d{
        {packed, absmax, nested_absmax, nested_code, offset, n, block_size, quant_type},
        value,
        out_dtype,
        out,
    };
    if (!good_weight(d.weight) || !value_dtype(value)) return PF_BAD_ARGUMENT;
    if (out_dtype != value && out_dtype != PF_FLOAT32) return PF_BAD_ARGUMENT;
    const int64_t grain = ceil_div(kDequantizeGrain, block_size);
    const auto run = kernels().dequantize;
    parallel_for(ceil_div(n, block_size), grain, threads, [&](int64_t first, int64_t last) {
        run(d, first, last);
    });
    return PF_OK;
}

int pf_cpu_nf4_gemv(
    const void* x, const uint8_t* packed, const void* absmax, const float* nested_absmax,
    const float* nested_code, const float* offset, int64_t m, int64_t n_out, int64_t k,
    int block_size, int quant_type, int dtype, const void* bias, void* out, int threads) {
    if (m < 0 || n_out < 0 || k < 0 || !value_dtype(dtype)) return PF_BAD_ARGUMENT;
    const Weight weight{
        packed, absmax, nested_absmax, nested_code, offset, n_out * k, block_size, quant_type,
    };
    if (!good_weight(weight)) return PF_BAD_ARGUMENT;
    if (m == 0 || n_out == 0) return PF_OK;
    const int64_t most = m < kGemvRows ? m : kGemvRows;
    SplitRows split(most, k);
    if (!split.allocated()) return PF_NO_MEMORY;
    Gemv g{
        weight, {split.even[0], split.even[1]}, {split.odd[0], split.odd[1]}, split.stride(), 0,
        n_out,  k, dtype, bias, nullptr,
    };
    const auto run = kernels().gemv;
    for (int64_t done = 0; done < m; done += most) {
        g.m = m - done < most ? m - done : most;
        split.fill(dtype, static_cast<const char*>(x) + done * k * element_size(dtype), g.m);
        g.out = static_cast<char*>(out) + done * n_out * element_size(dtype);
        const int64_t rows = ceil_div(kGemvGrain, k * g.m + 1);
        const int64_t grain = ceil_div(rows, 8) * 8;
        parallel_for(n_out, grain, threads, [&](int64_t first, int64_t last) {
            run(g, first, last);
        });
    }
    return PF_OK;
}

int pf_cpu_nf4_quantize(
    const void* w, int dtype, int64_t n, int block_size, int quant_type, uint8_t* packed,
    float* absmax, int threads) {
    const Weight weight{packed, absmax, nullptr, nullptr, nullptr, n, block_size, quant_type};
    if (!good_weight(weight) || !value_dtype(dtype)) return PF_BAD_ARGUMENT;
    const Quantize q{w, dtype, n, block_size, quant_type, packed, absmax};
    const auto run = kernels().quantize;
    const int64_t grain = ceil_div(kQuantizeGrain, block_size);
    parallel_for(ceil_div(n, block_size), grain, threads, [&](int64_t first, int64_t last) {
        run(q, first, last);
    });
    return PF_OK;
}

int pf_cpu_nf4_quantize_absmax(
    const float* values, const float* nested_code, int64_t blocks, uint8_t* codes,
    float* nested_absmax, int threads) {
    if (blocks < 0) return PF_BAD_ARGUMENT;
    const int64_t grain = ceil_div(kQuantizeGrain, kNestedBlock);
    const auto run = [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            const int64_t start = block * kNestedBlock;
            const int64_t count = blocks - start < kNestedBlock ? blocks - start : kNestedBlock;
            quantize_nested_block(
                values + start, nested_code, count, codes + start, nested_absmax + block);
        }
    };
    parallel_for(ceil_div(blocks, kNestedBlock), grain, threads, run);
    return PF_OK;
}

int pf_cpu_dropout_mask(
    const int64_t* seed, int limit, int64_t rows, int64_t cols, uint8_t* keep, int threads) {
    if (rows < 0 || cols < 0 || limit < -32768 || limit > 32768) return PF_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return PF_OK;
    if (limit == -32768 || limit == 32768) {
        memset(keep, limit < 0, static_cast<size_t>(rows) * static_cast<size_t>(cols));
        return PF_OK;
    }
    const Dropout d{static_cast<uint64_t>(*seed), limit, rows, cols, 1, nullptr, 0, keep, cols};
    const auto run = kernels().dropout_mask;
    parallel_for(rows, ceil_div(kDropoutGrain, cols), threads, [&](int64_t first, int64_t last) {
        run(d, first, last);
    });
    return PF_OK;
}

int pf_cpu_dropout_apply(
    const int64_t* seed, int limit, int64_t rows, int64_t cols, int element_size, const void* in,
    int64_t in_stride, void* out, int64_t out_stride, int threads) {
    if (rows < 0 || cols < 0 || limit < -32768 || limit > 32768) return PF_BAD_ARGUMENT;
    if (element_size != 2 && element_size != 4 && element_size != 8) return PF_BAD_ARGUMENT;
    if (rows == 0 || cols == 0) return PF_OK;
    const Dropout d{
        static_cast<uint64_t>(*seed), limit, rows, cols, element_size, in, in_stride, out, out_stride,
    };
    const auto run = kernels().dropout_apply;
    parallel_for(rows, ceil_div(kDropoutGrain, cols), threads, [&](int64_t first, int64_t last) {
        if (limit > -32768 && limit < 32768) {
            run(d, first, last);
            return;
        }
        for (int64_t row = first; row < last; ++row) {
            const size_t bytes = static_cast<size_t>(cols) * static_cast<size_t>(element_size);
            char* to = static_cast<char*>(out) + row * out_stride * element_size;
            if (limit == 32768) {
                memset(to, 0, bytes);
            } else {
                memmove(to, static_cast<const char*>(in) + row * in_stride * element_size, bytes);
            }
        }
    });
    return PF_OK;
}
