// The C interface of libpeftfast_cuda: kernels over plain device memory, for NVIDIA GPUs of compute
// capability 8.0 and up.
//
// Pointers are to device memory of the calling thread's current device and need no alignment beyond
// that of their elements (16 bytes make the fast kernels possible; others take what is left). Sizes
// are counted in elements. `stream` is a cudaStream_t of that device; a call returns when its one
// kernel is launched, waits for nothing, allocates nothing, and may be captured into a graph. Every
// function that can fail returns 0, a cudaError_t (positive) or a pf_cuda_status (negative);
// pf_cuda_error puts each in words. Results are the same on every call: no atomics, one order of
// summation for one set of sizes.
#ifndef PEFTFAST_CUDA_H
#define PEFTFAST_CUDA_H

#include "peftfast.h"

#ifdef __cplusplus
extern "C" {
#endif

// Grows with every change of this file that callers can see.
#define PF_CUDA_ABI 1

enum pf_cuda_status {
    PF_CUDA_NULL_POINTER = -1,
    PF_CUDA_BAD_STATISTICS = -2,
    PF_CUDA_BAD_SIZE = -3,
    PF_CUDA_BAD_BLOCK_SIZE = -4,
    PF_CUDA_BAD_QUANT_TYPE = -5,
    PF_CUDA_BAD_DTYPE = -6,
    PF_CUDA_MISALIGNED = -7,
    PF_CUDA_TOO_LARGE = -8,
};

PF_EXPORT int pf_cuda_abi(void);

// What a status means; never NULL, valid for as long as the library is loaded.
PF_EXPORT const char* pf_cuda_error(int status);

// A 4-bit weight of n elements, in row-major order: element 2i in the high half of packed[i], 2i+1
// in the low one. Plain statistics: absmax is float [blocks], the three pointers after it are null.
// Nested ones: absmax is uint8_t [blocks], codes into nested_code [256], which nested_absmax
// [ceil(blocks / 256)] scales and *offset shifts, each operation rounded to float. block_size is a
// power of two, 32 to 4096; quant_type a pf_quant_type.

// Fill out [n] with table[index] * absmax, rounded to value_dtype (PF_FLOAT32, PF_FLOAT16,
// PF_BFLOAT16); out_dtype is that, or PF_FLOAT32: the rounded values, stored wide.
PF_EXPORT int pf_cuda_nf4_dequantize(
    const void* packed, const void* absmax, const float* nested_absmax, const float* nested_code,
    const float* offset, int64_t n, int block_size, int quant_type, int value_dtype, int out_dtype,
    void* out, void* stream);

// Fill out [m, n_out] with x [m, k] W^T + bias [n_out] (NULL: none), W [n_out, k] the 4-bit weight
// rounded to dtype, which x, bias and out have too; summed in float, rounded once. Meant for few
// rows of x: W is decoded once for every 16 of them (float32: every 4).
PF_EXPORT int pf_cuda_nf4_gemv(
    const void* x, const void* packed, const void* absmax, const float* nested_absmax,
    const float* nested_code, const float* offset, int64_t m, int64_t n_out, int64_t k,
    int block_size, int quant_type, int dtype, const void* bias, void* out, void* stream);

#ifdef __cplusplus
}
#endif

#endif
