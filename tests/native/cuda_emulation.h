// Runs the kernels of csrc/cuda on a host, from their own source, thread by thread.
//
// Included ahead of csrc/cuda/api.cu, it takes the place of what csrc/cuda/device.cuh defines for a
// GPU. Every thread of a block is a fiber; a shuffle, a product of matrices or a barrier waits
// until all that take part are there; which thread runs in between is drawn at random, from a seed.
// On the way it checks what a GPU would not say:
//   - every access to global memory: inside memory that the test has named, on its boundary, not
//     into what is only read; writes are counted byte by byte;
//   - that the lanes of a warp meet at the same operation, and that all threads come to a barrier;
//   - that shared memory is not read before it is written (it starts as rubbish), nor before an
//     asynchronous copy into it is waited for (which turns it into rubbish until then), and that
//     nothing is written behind its arrays.
#pragma once

#define PF_EMULATED

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/peftfast_cuda.h"

struct uint4 {
    uint32_t x, y, z, w;
};

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;
constexpr int cudaDevAttrMultiProcessorCount = 16;

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 1 << 16, kGuard = 256;
constexpr unsigned char kRubbish = 0xDB;

struct Range {
    const char* begin;
    size_t size;
    bool writable;
    std::vector<uint8_t> writes;  // a byte each; empty: not counted
};

enum Kind { kNothing, kShuffle, kShuffleXor, kProduct, kBarrier };

struct Copy {
    char* to;
    uint4 bytes;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
    std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last is not committed
};

struct Lane {
    Kind kind;
    float value, result;
    uint32_t source;
    float* sum;
    uint32_t a[4], b[2];
};

struct Meeting {
    std::vector<int> waiting;
};

struct State {
    std::vector<Range> ranges;
    std::string report, kernel;
    uint64_t random = 1;
    int sms = 4, error = 0, errors_left = 0;
    int64_t blocks_run = 0;
    int64_t only_x = -1, only_y = -1;  // run this block alone

    unsigned grid_x, grid_y, block_x, block_y;
    int threads, current;
    std::vector<Fiber> fibers{kMostThreads};
    std::vector<int> ready;
    std::vector<Lane> lanes{kMostThreads};
    std::vector<Meeting> warps{kMostThreads / kWarp};
    Meeting block;
    ucontext_t scheduler;
    std::function<void()> body;
    std::vector<std::pair<char*, size_t>> shared;  // arrays that the running block has
};

inline State& state() {
    static State only;
    return only;
}

inline void complain(const std::string& what) {
    State& s = state();
    if (++s.errors_left > 20) return;
    s.report += what + " (block " + std::to_string(s.block_x) + ", " + std::to_string(s.block_y) +
                ", thread " + std::to_string(s.current) + ")\n";
}

inline uint64_t draw() {
    uint64_t& x = state().random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

// Whether an access may be done; a complaint where not.
inline bool allowed(const void* at, size_t size, size_t boundary, bool write) {
    const char* const what = write ? "a write" : "a read";
    const std::string bytes = " of " + std::to_string(size) + " bytes";
    if (reinterpret_cast<uintptr_t>(at) % boundary != 0) {
        complain(what + bytes + " off its boundary");
        return false;
    }
    const char* const first = static_cast<const char*>(at);
    for (Range& range : state().ranges) {
        if (first < range.begin || first + size > range.begin + range.size) continue;
        if (write && !range.writable) {
            complain(what + bytes + " into what is only read");
            return false;
        }
        for (size_t i = 0; write && i < size && !range.writes.empty(); ++i) {
            uint8_t& count = range.writes[static_cast<size_t>(first - range.begin) + i];
            if (count < 255) ++count;
        }
        return true;
    }
    complain(what + bytes + " out of bounds");
    return false;
}

inline void block_fiber() {
    State& s = state();
    swapcontext(&s.fibers[s.current].context, &s.scheduler);
}

// Wait for `members` threads; the last one of them calls `resolve`.
template <typename Resolve>
void meet(Meeting& meeting, int members, Resolve resolve) {
    State& s = state();
    if (static_cast<int>(meeting.waiting.size()) + 1 < members) {
        meeting.waiting.push_back(s.current);
        block_fiber();
        return;
    }
    resolve();
    s.ready.insert(s.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
}

inline Lane& mine() { return state().lanes[state().current]; }

template <typename Resolve>
void meet_warp(Kind kind, Resolve resolve) {
    State& s = state();
    Lane* const lanes = &s.lanes[s.current / kWarp * kWarp];
    mine().kind = kind;
    meet(s.warps[s.current / kWarp], kWarp, [&] {
        for (int i = 0; i < kWarp; ++i) {
            if (lanes[i].kind != kind) {
                complain("lanes of a warp are at different operations");
                break;
            }
        }
        resolve(lanes);
    });
}

inline float bfloat16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t bfloat16_bits(float value) {
    if (std::isnan(value)) return 0x7FFF;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float float16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                  : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                  : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

inline uint16_t float16_bits(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(static_cast<double>(value));
    if (size >= 65520.0) return sign | 0x7C00;
    // The distance of neighbours: 2^-24 below the least normal number, else 2^-10 of the power of
    // two.
    const int exponent = size < std::ldexp(1.0, -14) ? -14 : std::ilogb(size);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<uint16_t>(sign + (exponent + 14) * 1024 + steps);
}

inline float narrow_value(int dtype, uint16_t bits) {
    return dtype == PF_BFLOAT16 ? bfloat16_value(bits) : float16_value(bits);
}

inline void multiply(Lane* lanes, int dtype) {
    float a[16][16], b[16][8];
    const auto half = [&](uint32_t word, int i) {
        return narrow_value(dtype, static_cast<uint16_t>(word >> 16 * i));
    };
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; ++i) {
            a[g][2 * t + i] = half(lanes[lane].a[0], i);
            a[g + 8][2 * t + i] = half(lanes[lane].a[1], i);
            a[g][2 * t + 8 + i] = half(lanes[lane].a[2], i);
            a[g + 8][2 * t + 8 + i] = half(lanes[lane].a[3], i);
            b[2 * t + i][g] = half(lanes[lane].b[0], i);
            b[2 * t + 8 + i][g] = half(lanes[lane].b[1], i);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            double sum = 0.0;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            lanes[lane].sum[i] = static_cast<float>(lanes[lane].sum[i] + sum);
        }
    }
}

// A block's thread comes to an array of shared memory; the first one makes rubbish of it.
inline void shared(char* array, size_t size) {
    State& s = state();
    for (const auto& known : s.shared) {
        if (known.first == array) return;
    }
    memset(array, kRubbish, size + kGuard);
    s.shared.emplace_back(array, size);
}

inline void run_fiber() {
    State& s = state();
    s.body();
    s.fibers[s.current].done = true;
    block_fiber();
}

inline void run_block() {
    State& s = state();
    s.ready.clear();
    s.shared.clear();
    s.block.waiting.clear();
    for (Meeting& warp : s.warps) warp.waiting.clear();
    for (int i = 0; i < s.threads; ++i) {
        Fiber& fiber = s.fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        fiber.done = false;
        fiber.groups.assign(1, {});
        makecontext(&fiber.context, run_fiber, 0);
        s.lanes[i].kind = kNothing;
        s.ready.push_back(i);
    }
    for (size_t i = s.ready.size(); i > 1; --i) std::swap(s.ready[i - 1], s.ready[draw() % i]);
    const bool any = draw() % 2;
    while (!s.ready.empty()) {
        if (any) std::swap(s.ready[draw() % s.ready.size()], s.ready.back());
        s.current = s.ready.back();
        s.ready.pop_back();
        swapcontext(&s.scheduler, &s.fibers[s.current].context);
    }
    for (s.current = 0; s.current < s.threads; ++s.current) {
        if (!s.fibers[s.current].done) {
            complain("threads wait for others that do not come");
            break;
        }
    }
    for (const auto& [array, size] : s.shared) {
        for (size_t i = 0; i < kGuard; ++i) {
            if (static_cast<unsigned char>(array[size + i]) != kRubbish) {
                complain("a write behind an array of shared memory");
                break;
            }
        }
    }
    ++s.blocks_run;
}

template <typename Arguments>
void launch(
    void (*kernel)(Arguments), int64_t x, int64_t y, int threads, const Arguments& arguments) {
    State& s = state();
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(kernel), &info);
    s.kernel = info.dli_sname ? info.dli_sname : "";
    if (x < 1 || x > 0x7FFFFFFF || y < 1 || y > 65535 || threads < 1 || threads > kMostThreads) {
        s.error = cudaErrorInvalidConfiguration;
        return;
    }
    s.grid_x = static_cast<unsigned>(x), s.grid_y = static_cast<unsigned>(y), s.threads = threads;
    s.body = [&] { kernel(arguments); };
    for (s.block_y = 0; s.block_y < s.grid_y; ++s.block_y) {
        if (s.only_y >= 0 && s.block_y != s.only_y) continue;
        for (s.block_x = 0; s.block_x < s.grid_x; ++s.block_x) {
            if (s.only_x >= 0) s.block_x = static_cast<unsigned>(s.only_x);
            run_block();
            if (s.only_x >= 0) break;
        }
    }
}

}  // namespace emulation

#define PF_DEVICE inline
#define PF_BOTH inline
#define PF_CONSTANT static const
#define PF_KERNEL(threads, blocks_per_sm) extern "C" PF_EXPORT void
#define PF_SHARED(type, name, count)                           \
    alignas(16) static struct {                                \
        type array[count];                                     \
        char guard[emulation::kGuard];                         \
    } name##_memory;                                           \
    type(&name)[count] = name##_memory.array;                  \
    emulation::shared(reinterpret_cast<char*>(&name##_memory), sizeof(type[count]))
#define PF_LAUNCH(kernel, blocks_x, blocks_y, threads, stream, arguments) \
    ((void)(stream), emulation::launch(kernel, blocks_x, blocks_y, threads, arguments))

// A device for each number of SMs, as what is known of a device is kept.
inline cudaError_t cudaGetDevice(int* device) {
    *device = emulation::state().sms;
    return emulation::state().error;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int device) {
    *value = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    const int error = emulation::state().error;
    emulation::state().error = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of CUDA's"; }

namespace pf {

inline int thread() { return emulation::state().current; }
inline uint32_t block() { return emulation::state().block_x; }
inline uint32_t block_y() { return emulation::state().block_y; }
inline uint32_t blocks() { return emulation::state().grid_x; }

inline void sync_warp() {
    emulation::meet_warp(emulation::kBarrier, [](emulation::Lane*) {});
}
inline void sync_block() {
    emulation::State& s = emulation::state();
    emulation::meet(s.block, s.threads, [] {});
}
inline float shuffle(float value, uint32_t source) {
    emulation::Lane& lane = emulation::mine();
    lane.value = value, lane.source = source;
    emulation::meet_warp(emulation::kShuffle, [](emulation::Lane* lanes) {
        for (int i = 0; i < 32; ++i) lanes[i].result = lanes[lanes[i].source % 32].value;
    });
    return lane.result;
}
inline float shuffle_xor(float value, int mask) {
    emulation::Lane& lane = emulation::mine();
    lane.value = value, lane.source = static_cast<uint32_t>(thread() % 32 ^ mask);
    emulation::meet_warp(emulation::kShuffleXor, [](emulation::Lane* lanes) {
        for (int i = 0; i < 32; ++i) lanes[i].result = lanes[lanes[i].source % 32].value;
    });
    return lane.result;
}
inline int warp_of_thread() {
    sync_warp();
    return thread() / 32;
}

inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

template <typename T>
T load(const T* from) {
    T value;
    memset(&value, emulation::kRubbish, sizeof(T));
    if (emulation::allowed(from, sizeof(T), sizeof(T), false)) memcpy(&value, from, sizeof(T));
    return value;
}
inline uint4 load_if(bool wanted, const void* from) {
    return wanted ? load(static_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
}
inline uint4 load_once_if(bool wanted, const void* from) { return load_if(wanted, from); }
template <typename T>
void store(T* to, T value) {
    if (emulation::allowed(to, sizeof(T), sizeof(T), true)) memcpy(to, &value, sizeof(T));
}

inline void copy_async(uint4* to, const uint4* from, uint64_t) {
    emulation::State& s = emulation::state();
    char* const at = reinterpret_cast<char*>(to);
    const bool inside = std::any_of(s.shared.begin(), s.shared.end(), [&](const auto& array) {
        return at >= array.first && at + 16 <= array.first + array.second;
    });
    if (!inside || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
        emulation::complain("an asynchronous copy to what is no 16 bytes of shared memory");
        return;
    }
    s.fibers[s.current].groups.back().push_back({at, load(from)});
    memset(at, emulation::kRubbish, 16);
}
inline void copy_commit() {
    emulation::State& s = emulation::state();
    s.fibers[s.current].groups.emplace_back();
}
template <int kLeft>
void copy_wait() {
    emulation::State& s = emulation::state();
    auto& groups = s.fibers[s.current].groups;
    const size_t committed = groups.size() - 1;
    const size_t ready = committed > kLeft ? committed - kLeft : 0;
    for (size_t i = 0; i < ready; ++i) {
        for (const emulation::Copy& copy : groups[i]) memcpy(copy.to, &copy.bytes, 16);
    }
    groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(ready));
}
inline uint64_t once_policy() { return 0; }

template <int kDtype>
uint32_t pack(float low, float high) {
    if (kDtype == PF_BFLOAT16) {
        return emulation::bfloat16_bits(low) |
               static_cast<uint32_t>(emulation::bfloat16_bits(high)) << 16;
    }
    return emulation::float16_bits(low) |
           static_cast<uint32_t>(emulation::float16_bits(high)) << 16;
}
template <int kDtype>
float widen(uint16_t narrow) {
    return emulation::narrow_value(kDtype, narrow);
}
template <int kDtype>
void mma(
    float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    emulation::Lane& lane = emulation::mine();
    lane.sum = sum;
    lane.a[0] = a0, lane.a[1] = a1, lane.a[2] = a2, lane.a[3] = a3, lane.b[0] = b0, lane.b[1] = b1;
    emulation::meet_warp(
        emulation::kProduct, [](emulation::Lane* lanes) { emulation::multiply(lanes, kDtype); });
}

}  // namespace pf

// What a test calls.
extern "C" {

PF_EXPORT void pf_emulation_begin(uint64_t seed, int sms) {
    emulation::State& s = emulation::state();
    s.ranges.clear();
    s.report.clear();
    s.kernel.clear();
    s.random = seed * 2 + 1;
    s.sms = sms;
    s.error = s.errors_left = 0;
    s.blocks_run = 0;
    s.only_x = s.only_y = -1;
}
// Memory that a kernel may touch; `count`: writes are counted.
PF_EXPORT void pf_emulation_range(void* begin, uint64_t size, int writable, int count) {
    emulation::Range range{static_cast<const char*>(begin), size, writable != 0, {}};
    if (count) range.writes.assign(size, 0);
    emulation::state().ranges.push_back(range);
}
PF_EXPORT void pf_emulation_only(int64_t x, int64_t y) {
    emulation::state().only_x = x;
    emulation::state().only_y = y;
}
// Make the next call of cudaGetDevice or cudaGetLastError return an error.
PF_EXPORT void pf_emulation_fail(int error) { emulation::state().error = error; }
// How often the least and the most often written byte of a range was.
PF_EXPORT void pf_emulation_writes(void* begin, int* least, int* most) {
    for (const emulation::Range& range : emulation::state().ranges) {
        if (range.begin != begin || range.writes.empty()) continue;
        *least = *std::min_element(range.writes.begin(), range.writes.end());
        *most = *std::max_element(range.writes.begin(), range.writes.end());
    }
}
PF_EXPORT const char* pf_emulation_report(void) { return emulation::state().report.c_str(); }
PF_EXPORT const char* pf_emulation_kernel(void) { return emulation::state().kernel.c_str(); }
PF_EXPORT int64_t pf_emulation_blocks(void) { return emulation::state().blocks_run; }
}
