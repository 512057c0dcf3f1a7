// The C interface: checks, the choice of kernels, the split into parallel work.

#include <string.h>

#include <atomic>

#include "kernels.h"
#include "parallel.h"

namespace pf {
namespace {

// The least work worth a thread, in elements that are written: some ten microseconds.
constexpr int64_t kDequantizeGrain = 1 << 15;
constexpr int64_t kDropoutGrain = 1 << 14;

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
