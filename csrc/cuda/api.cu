// The C interface and its launches. This is the only file to compile: the kernels are in the
// headers beside it. Compile with -std=c++17 for sm_80 and up, and link the CUDA runtime
// statically.

#include <atomic>

#include "nf4_dequantize.cuh"
#include "nf4_gemv.cuh"

#define PF_DEQUANTIZE(name, value, wide)                                          \
    PF_KERNEL(pf::kDequantizeThreads, pf::kDequantizeBlocks)                      \
    name(const pf::Dequantize d) { pf::dequantize_chunks<value, wide>(d); }

PF_DEQUANTIZE(pf_nf4_dequantize_fp32, PF_FLOAT32, false)
PF_DEQUANTIZE(pf_nf4_dequantize_fp16, PF_FLOAT16, false)
PF_DEQUANTIZE(pf_nf4_dequantize_bf16, PF_BFLOAT16, false)
PF_DEQUANTIZE(pf_nf4_dequantize_fp16_fp32, PF_FLOAT16, true)
PF_DEQUANTIZE(pf_nf4_dequantize_bf16_fp32, PF_BFLOAT16, true)
PF_KERNEL(pf::kDequantizeThreads, pf::kDequantizeBlocks)
pf_nf4_dequantize_any(const pf::Dequantize d) { pf::dequantize_any(d); }

#define PF_GEMV(name, dtype, tokens)                             \
    PF_KERNEL(pf::kGemvThreads, pf::gemv_blocks(tokens))       \
    name(const pf::Gemv g) { pf::gemv_rows<dtype, tokens>(g); }

PF_GEMV(pf_nf4_gemv_fp32, PF_FLOAT32, 4)
PF_GEMV(pf_nf4_gemv_fp16_8, PF_FLOAT16, 8)
PF_GEMV(pf_nf4_gemv_fp16_16, PF_FLOAT16, 16)
PF_GEMV(pf_nf4_gemv_bf16_8, PF_BFLOAT16, 8)
PF_GEMV(pf_nf4_gemv_bf16_16, PF_BFLOAT16, 16)
PF_KERNEL(pf::kAnyThreads, pf::kAnyBlocks)
pf_nf4_gemv_any(const pf::Gemv g) { pf::gemv_any(g); }

namespace pf {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 62;
// Blocks of one launch.
constexpr int64_t kMostX = (int64_t{1} << 31) - 1, kMostY = 65535;
constexpr int kMostDevices = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

int item_of(int dtype) { return dtype == PF_FLOAT32 ? 4 : 2; }

bool is_dtype(int dtype) {
    return dtype == PF_FLOAT32 || dtype == PF_FLOAT16 || dtype == PF_BFLOAT16;
}

// SMs of the current device; a device is asked once.
int sm_count(int* count) {
    static std::atomic<int> known[kMostDevices];
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const bool keep = device < kMostDevices;
    *count = keep ? known[device].load(std::memory_order_relaxed) : 0;
    if (*count > 0) return PF_OK;
    error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && keep) known[device].store(*count, std::memory_order_relaxed);
    return error;
}

int check_weight(
    const void* absmax, const float* nested_absmax, const float* nested_code, const float* offset,
    int block_size, int quant_type) {
    const bool nested = nested_absmax || nested_code || offset;
    if (nested && !(nested_absmax && nested_code && offset)) return PF_CUDA_BAD_STATISTICS;
    const bool power = (block_size & (block_size - 1)) == 0;
    if (!power || block_size < kSmallestBlock || block_size > kLargestBlock) {
        return PF_CUDA_BAD_BLOCK_SIZE;
    }
    if (quant_type != PF_NF4 && quant_type != PF_FP4) return PF_CUDA_BAD_QUANT_TYPE;
    const bool good = (nested || aligned(absmax, 4)) && aligned(nested_absmax, 4) &&
                      aligned(nested_code, 4) && aligned(offset, 4);
    if (!good) return PF_CUDA_MISALIGNED;
    return PF_OK;
}

Statistics statistics_of(
    const void* absmax, const float* nested_absmax, const float* nested_code, const float* offset,
    int block_size) {
    int shift = 0;
    while (1 << shift < block_size) ++shift;
    return {absmax, nested_absmax, nested_code, offset, shift};
}

int launch_dequantize(const Dequantize& d, void* stream) {
    int sms = 0;
    if (const int error = sm_count(&sms)) return error;
    const bool vectors = aligned(d.packed, 16) && aligned(d.out, 16);
    // Elements of a warp: a chunk, or two a lane.
    const int64_t taken = int64_t{kDequantizeWarps} * (vectors ? kChunk : 2 * kWarp);
    const int64_t wanted = ceil_div(d.n, taken);
    const int64_t resident = int64_t{sms} * kDequantizeBlocks;
    const unsigned blocks = static_cast<unsigned>(wanted < resident ? wanted : resident);
    auto* kernel = pf_nf4_dequantize_any;
    if (vectors && d.value_dtype == PF_FLOAT32) {
        kernel = pf_nf4_dequantize_fp32;
    } else if (vectors && d.value_dtype == PF_FLOAT16) {
        kernel = d.out_dtype == PF_FLOAT16 ? pf_nf4_dequantize_fp16 : pf_nf4_dequantize_fp16_fp32;
    } else if (vectors) {
        kernel = d.out_dtype == PF_BFLOAT16 ? pf_nf4_dequantize_bf16 : pf_nf4_dequantize_bf16_fp32;
    }
    PF_LAUNCH(kernel, blocks, 1, kDequantizeThreads, stream, d);
    return cudaGetLastError();
}

int launch_any(const Gemv& g, void* stream) {
    const int64_t token_tiles = ceil_div(g.m, kAnyTokens), row_tiles = ceil_div(g.n_out, kAnyWarps);
    if (row_tiles > kMostX || token_tiles > kMostY) return PF_CUDA_TOO_LARGE;
    PF_LAUNCH(pf_nf4_gemv_any, row_tiles, token_tiles, kAnyThreads, stream, g);
    return cudaGetLastError();
}

int launch_gemv(Gemv& g, int block_size, void* stream) {
    const bool many = g.m > 8 && g.dtype != PF_FLOAT32;
    const int tokens = g.dtype == PF_FLOAT32 ? 4 : many ? 16 : 8;
    const int64_t token_tiles = ceil_div(g.m, tokens), row_tiles = ceil_div(g.n_out, kRows);
    const bool vectors = g.k % kRun == 0 && g.k > 0 && g.k <= kMostK && aligned(g.packed, 16) &&
                         aligned(g.x, 16) && token_tiles <= kMostX && row_tiles <= kMostY;
    if (!vectors) return launch_any(g, stream);
    // Rounds whose scales fit, wherever a row's first block may be cut; of the pitches that put
    // eight rows in different banks, the least.
    const int64_t round = int64_t{kRound} * kSpan;
    const int64_t fitting = int64_t{kMostScales - 1} * block_size / round;
    const int64_t needed = ceil_div(g.k, round);
    g.segment = static_cast<int>((fitting < needed ? fitting : needed) * kRound);
    const int64_t segment = int64_t{g.segment} * kSpan;
    const int64_t length = segment < g.k ? segment : g.k;
    const int most = static_cast<int>((block_size - 1 + length - 1) / block_size) + 1;
    g.pitch = (most + 3) / 8 * 8 + 4;
    auto* const kernel = g.dtype == PF_FLOAT32   ? pf_nf4_gemv_fp32
                         : g.dtype == PF_FLOAT16 ? many ? pf_nf4_gemv_fp16_16 : pf_nf4_gemv_fp16_8
                         : many                  ? pf_nf4_gemv_bf16_16
                                                 : pf_nf4_gemv_bf16_8;
    PF_LAUNCH(kernel, token_tiles, row_tiles, kGemvThreads, stream, g);
    return cudaGetLastError();
}

}  // namespace
}  // namespace pf

using namespace pf;

int pf_cuda_abi(void) { return PF_CUDA_ABI; }

const char* pf_cuda_error(int status) {
    switch (status) {
        case PF_OK: return "no error";
        case PF_CUDA_NULL_POINTER: return "packed, absmax, x or out is null";
        case PF_CUDA_BAD_STATISTICS:
            return "nested_absmax, nested_code and offset are given all three or not at all";
        case PF_CUDA_BAD_SIZE: return "a size is negative";
        case PF_CUDA_BAD_BLOCK_SIZE: return "block_size is no power of two from 32 to 4096";
        case PF_CUDA_BAD_QUANT_TYPE: return "quant_type is neither 0 (nf4) nor 1 (fp4)";
        case PF_CUDA_BAD_DTYPE:
            return "a dtype is none of 0 (float32), 1 (float16), 2 (bfloat16), or out_dtype is "
                   "neither value_dtype nor 0";
        case PF_CUDA_MISALIGNED: return "a pointer is no multiple of its elements' size";
        case PF_CUDA_TOO_LARGE: return "the sizes are beyond what one launch can address";
        default: return cudaGetErrorString(static_cast<cudaError_t>(status));
    }
}

int pf_cuda_nf4_dequantize(
    const void* packed, const void* absmax, const float* nested_absmax, const float* nested_code,
    const float* offset, int64_t n, int block_size, int quant_type, int value_dtype, int out_dtype,
    void* out, void* stream) {
    if (const int error =
            check_weight(absmax, nested_absmax, nested_code, offset, block_size, quant_type)) {
        return error;
    }
    if (n < 0) return PF_CUDA_BAD_SIZE;
    if (n > kMostElements) return PF_CUDA_TOO_LARGE;
    if (!is_dtype(value_dtype) || (out_dtype != value_dtype && out_dtype != PF_FLOAT32)) {
        return PF_CUDA_BAD_DTYPE;
    }
    if (n == 0) return PF_OK;
    if (!packed || !absmax || !out) return PF_CUDA_NULL_POINTER;
    if (!aligned(out, item_of(out_dtype))) return PF_CUDA_MISALIGNED;
    const Dequantize d{
        static_cast<const uint8_t*>(packed),
        statistics_of(absmax, nested_absmax, nested_code, offset, block_size),
        n, quant_type, value_dtype, out_dtype, out};
    return launch_dequantize(d, stream);
}

int pf_cuda_nf4_gemv(
    const void* x, const void* packed, const void* absmax, const float* nested_absmax,
    const float* nested_code, const float* offset, int64_t m, int64_t n_out, int64_t k,
    int block_size, int quant_type, int dtype, const void* bias, void* out, void* stream) {
    if (const int error =
            check_weight(absmax, nested_absmax, nested_code, offset, block_size, quant_type)) {
        return error;
    }
    if (m < 0 || n_out < 0 || k < 0) return PF_CUDA_BAD_SIZE;
    if (!is_dtype(dtype)) return PF_CUDA_BAD_DTYPE;
    if (m == 0 || n_out == 0) return PF_OK;
    if (k > 0 && (n_out > kMostElements / k || m > kMostElements / k)) return PF_CUDA_TOO_LARGE;
    if (m > kMostElements / n_out) return PF_CUDA_TOO_LARGE;
    if (!out || (k > 0 && (!x || !packed || !absmax))) return PF_CUDA_NULL_POINTER;
    const int item = item_of(dtype);
    if (!aligned(out, item) || !aligned(x, item) || !aligned(bias, item)) return PF_CUDA_MISALIGNED;
    Gemv g{
        x, static_cast<const uint8_t*>(packed),
        statistics_of(absmax, nested_absmax, nested_code, offset, block_size),
        m, n_out, k, quant_type, dtype, bias, out, 0, 0};
    return launch_gemv(g, block_size, stream);
}
