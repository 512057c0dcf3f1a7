// What the kernels take from the GPU: every access to global memory, every exchange between threads
// and every instruction of its own goes through these functions. tests/native/cuda_emulation.h has
// the same ones for a host, which runs the kernels' very source thread by thread and checks each
// access.
#pragma once

#include <stdint.h>

#include "../peftfast_cuda.h"

#ifndef PF_EMULATED

#include <cuda_runtime.h>

#define PF_DEVICE __device__ __forceinline__
#define PF_BOTH __host__ __device__ __forceinline__
#define PF_CONSTANT static __constant__ const
#define PF_KERNEL(threads, blocks_per_sm) \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
// An array in the block's shared memory, on a boundary of 16 bytes.
#define PF_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define PF_LAUNCH(kernel, blocks_x, blocks_y, threads, stream, arguments)              \
    kernel<<<dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y)), \
             threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments)

namespace pf {

// Read anew at each call, which costs less than a register held over a loop.
PF_DEVICE int thread() {
    uint32_t value;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
    return static_cast<int>(value & 1023);  // never negative: halves and remainders are cheap
}
PF_DEVICE uint32_t block() {
    uint32_t value;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(value));
    return value;
}
PF_DEVICE uint32_t block_y() {
    uint32_t value;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(value));
    return value;
}
PF_DEVICE uint32_t blocks() { return gridDim.x; }
// The warp's number in its block, as a value that the compiler knows to be the warp's.
PF_DEVICE int warp_of_thread() {
    return __shfl_sync(0xffffffffu, thread() / 32, 0);
}
PF_DEVICE void sync_warp() { __syncwarp(); }
PF_DEVICE void sync_block() { __syncthreads(); }

// The value that lane `source % 32` gives. The whole warp calls it.
PF_DEVICE float shuffle(float value, uint32_t source) {
    return __shfl_sync(0xffffffffu, value, static_cast<int>(source));
}
PF_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Rounded by itself: never one half of a fused multiply-add.
PF_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
PF_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
PF_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

PF_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
PF_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Global memory that nothing writes while the kernel runs.
template <typename T>
PF_DEVICE T load(const T* from) {
    return __ldg(from);
}
// 16 bytes, zeros where they are not wanted, without a branch; what is read once takes no line of
// L1.
PF_DEVICE uint4 load_once_if(bool wanted, const void* from) {
    uint4 value{0, 0, 0, 0};
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
        "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
        : "l"(from), "r"(static_cast<int>(wanted)));
    return value;
}
PF_DEVICE uint4 load_if(bool wanted, const void* from) {
    uint4 value{0, 0, 0, 0};
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
        : "l"(from), "r"(static_cast<int>(wanted)));
    return value;
}
template <typename T>
PF_DEVICE void store(T* to, T value) {
    *to = value;
}

// 16 bytes from global to shared memory, both on such a boundary, past L1 and the registers. The
// bytes are there for a thread after copy_wait<n>() where n or fewer commits follow the copy's own,
// and for its warp after the sync_warp() behind that. `policy` is once_policy().
PF_DEVICE void copy_async(uint4* to, const uint4* from, uint64_t policy) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(from), "l"(policy)
                 : "memory");
}
PF_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
PF_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Lines of L2 that are the first to make room.
PF_DEVICE uint64_t once_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Two floats rounded to a 16-bit type, to nearest even: `low` in the low half of a word.
template <int kDtype>
PF_DEVICE uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (kDtype == PF_BFLOAT16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    }
    return both;
}
template <int kDtype>
PF_DEVICE float widen(uint16_t narrow) {
    if constexpr (kDtype == PF_BFLOAT16) {
        return __uint_as_float(static_cast<uint32_t>(narrow) << 16);
    } else {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(narrow));
        return wide;
    }
}

// sum [16, 8] += a [16, 16] b [16, 8] of a 16-bit type, the warp together. With g = lane / 4 and
// t = lane % 4, a lane has of a: rows g and g + 8 at columns 2t, 2t + 1 in a0 and a1, the same rows
// at columns 2t + 8, 2t + 9 in a2 and a3; of b: rows 2t, 2t + 1 of column g in b0, 2t + 8, 2t + 9
// in b1; of sum: columns 2t, 2t + 1 of row g, then of row g + 8.
template <int kDtype>
PF_DEVICE void mma(
    float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    if constexpr (kDtype == PF_BFLOAT16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

}  // namespace pf

#endif
