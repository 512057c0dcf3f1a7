// The C interface of libpeftfast_cpu: kernels over plain memory, for CPUs.
//
// Pointers are to host memory and need no alignment beyond that of their elements; sizes are counted
// in elements, strides too. Every function that can fail returns a pf_status. `threads` is the
// most threads that a call may use; small work uses fewer. No function keeps a pointer after it
// returns, and none depends on the number of threads in its result.
#ifndef PEFTFAST_H
#define PEFTFAST_H

#include <stdint.h>

#if defined(__GNUC__)
#define PF_EXPORT __attribute__((visibility("default")))
#else
#define PF_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Grows with every change of this file that callers can see.
#define PF_CPU_ABI 1

enum pf_dtype { PF_FLOAT32 = 0, PF_FLOAT16 = 1, PF_BFLOAT16 = 2, PF_FLOAT64 = 3 };
enum pf_quant_type { PF_NF4 = 0, PF_FP4 = 1 };
enum pf_status {
    PF_OK = 0,
    PF_BAD_ARGUMENT = 1,   // a code or size that the function does not take
    PF_UNKNOWN_ISA = 2,    // no instruction set of that name
    PF_UNSUPPORTED_ISA = 3,  // this build or this machine lacks it
    PF_NO_MEMORY = 4,
};

PF_EXPORT int pf_cpu_abi(void);

// The instruction set in use: "portable", "avx2" or "avx512".
PF_EXPORT const char* pf_cpu_isa(void);

// The best instruction set that this build and this machine have.
PF_EXPORT const char* pf_cpu_best_isa(void);

// Use the kernels of one instruction set from now on; NULL: the best. Not while others compute.
PF_EXPORT int pf_cpu_use_isa(const char* name);

// What runs parallel work: "OpenMP", the runtime that the process has loaded already, or "threads".
PF_EXPORT const char* pf_cpu_threading(void);

// A 4-bit weight of n elements, in row-major order: element 2i in the high half of packed[i], 2i+1 in
// the low one. Plain statistics: absmax is float [blocks], the three pointers after it are null.
// Nested ones: absmax is uint8_t [blocks], codes into nested_code [256], which nested_absmax
// [ceil(blocks / 256)] scales and *offset shifts, each operation rounded to float.
//
// Fill out [n] with table[index] * absmax, rounded to value_dtype (PF_FLOAT32, PF_FLOAT16,
// PF_BFLOAT16); out_dtype is that, or PF_FLOAT32: the rounded values, stored wide.
PF_EXPORT int pf_cpu_nf4_dequantize(
    const uint8_t* packed, const void* absmax, const float* nested_absmax, const float* nested_code,
    const float* offset, int64_t n, int block_size, int quant_type, int value_dtype, int out_dtype,
    void* out, int threads);

// Fill out [m, n_out] with x [m, k] W^T + bias, W [n_out, k] being the weight, rounded to dtype
// (PF_FLOAT32, PF_FLOAT16, PF_BFLOAT16), that of x, bias (may be null) and out; all contiguous. Sums
// are in float and rounded once.
PF_EXPORT int pf_cpu_nf4_gemv(
    const void* x, const uint8_t* packed, const void* absmax, const float* nested_absmax,
    const float* nested_code, const float* offset, int64_t m, int64_t n_out, int64_t k,
    int block_size, int quant_type, int dtype, const void* bias, void* out, int threads);

// packed [ceil(n / 2)] and absmax [ceil(n / block_size)] of w [n], by the rules of bitsandbytes on a
// CPU. The half byte after an odd n holds the index of zero.
PF_EXPORT int pf_cpu_nf4_quantize(
    const void* w, int dtype, int64_t n, int block_size, int quant_type, uint8_t* packed,
    float* absmax, int threads);

// codes [blocks] and nested_absmax [ceil(blocks / 256)] of statistics from which the offset has been
// taken off, by the rules of bitsandbytes on a CPU. nested_code [256] ascends.
PF_EXPORT int pf_cpu_nf4_quantize_absmax(
    const float* values, const float* nested_code, int64_t blocks, uint8_t* codes,
    float* nested_absmax, int threads);

// Philox4x32-7 dropout, as peftfast/reference/dropout.py defines it: element (row, col) is kept where
// its 16 bits, read as a signed number, are >= limit (-32768: all are kept; 32768: none).

// keep [rows, cols], contiguous: 1 where the element is kept, else 0.
PF_EXPORT int pf_cpu_dropout_mask(
    const int64_t* seed, int limit, int64_t rows, int64_t cols, uint8_t* keep, int threads);

// out = kept ? in : 0 for elements of 2, 4 or 8 bytes, copied as they are. in and out are the same
// memory or don't overlap; columns are contiguous, rows `stride` elements apart.
PF_EXPORT int pf_cpu_dropout_apply(
    const int64_t* seed, int limit, int64_t rows, int64_t cols, int element_size, const void* in,
    int64_t in_stride, void* out, int64_t out_stride, int threads);

#ifdef __cplusplus
}
#endif

#endif
