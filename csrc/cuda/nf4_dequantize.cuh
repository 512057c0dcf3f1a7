// 4-bit weights to dense ones, in one launch whatever the scales' form.
//
//     out[e] = round(table[index_e] * absmax[e / block_size])
//     absmax[b] = round(round(nested_code[code_b] * nested_absmax[b / 256]) + offset)
//
// Moves n / 2 bytes of codes, the scales (n / block_size bytes, four times that where they are
// plain) and out, once each: 2.52 bytes an element for 16-bit values and nested blocks of 64. For
// 4096 x 4096 that is 42 MB: 21 us at 2.0 TB/s (A100), 12.6 us at 3.35 TB/s (H100).
//
// A warp takes 1024 elements at a time. It copies their codes, 16 bytes a lane, asynchronously into
// shared memory of its own, two chunks ahead: 40 KiB on their way an SM, where the products of
// bandwidth and latency ask for some 20. It reads them back as 4 bytes a lane (2 for float output),
// side by side, so that a lane's values are 16 bytes of the output, and the warp's 512 in a row:
// every store fills whole lines. A lane decodes the scale of one of the chunk's blocks, a chunk
// ahead too; the others get it by a shuffle, as they get table entries.
//
// In the machine code (nvcc 13.0) of the loop, for 32 elements a lane: 191 instructions on sm_80,
// 200 on sm_90 and sm_100, 36 of them shuffles: 6.3 an element at most. An SM issues 128 lanes'
// instructions a clock, 20 elements; the bandwidth asks for 5.2 (A100) and 5.7 (H100). Shuffles,
// loads and stores take some 68 of the load-store unit's clocks for 1024 elements: 15 a clock.
#pragma once

#include <type_traits>

#include "nf4_values.cuh"

namespace pf {

struct Dequantize {
    const uint8_t* packed;
    Statistics statistics;
    int64_t n;
    int quant_type;
    int value_dtype;
    int out_dtype;
    void* out;
};

constexpr int kDequantizeWarps = 8;
constexpr int kDequantizeThreads = kDequantizeWarps * kWarp;
constexpr int kDequantizeBlocks = 5;  // of threads, on one SM at a time
constexpr int kStages = 3;            // chunks of a warp in shared memory
constexpr int kChunk = 1024;          // elements that a warp takes at a time: 16 bytes a lane

// Two elements a lane and step, every access as narrow as its element: for what the fast kernel's
// vectors can't touch. Bytes [first, last), `stride` apart for one warp. The whole warp calls it.
PF_DEVICE void dequantize_bytes(const Dequantize& d, int64_t first, int64_t last, int64_t stride) {
    const int lane = thread() % kWarp;
    const float entry = kTables[d.quant_type][lane % 16];
#pragma unroll 1
    for (int64_t base = first; base < last; base += stride) {
        const int64_t byte = base + lane;
        const bool live = byte < last;
        const uint32_t both = live ? load(d.packed + byte) : 0;
        const float scale =
            live ? scale_at(d.statistics, 2 * byte >> d.statistics.block_shift) : 0.0f;
        const float high = round_to(d.value_dtype, mul(shuffle(entry, both >> 4), scale));
        const float low = round_to(d.value_dtype, mul(shuffle(entry, both), scale));
        if (live) store_rounded(d.out_dtype, d.out, 2 * byte, high);
        if (live && 2 * byte + 1 < d.n) store_rounded(d.out_dtype, d.out, 2 * byte + 1, low);
    }
}

PF_DEVICE void dequantize_any(const Dequantize& d) {
    const int64_t warp = static_cast<int64_t>(block()) * kDequantizeWarps + warp_of_thread();
    const int64_t warps = static_cast<int64_t>(blocks()) * kDequantizeWarps;
    dequantize_bytes(d, warp * kWarp, (d.n + 1) / 2, warps * kWarp);
}

// Write a lane's values, 16 bytes of them.
template <int kValue, bool kWide>
PF_DEVICE void store_values(void* to, const float* values) {
    uint4 bits;
    if constexpr (kValue == PF_FLOAT32) {
        bits = {bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3])};
    } else {
        const uint32_t first = pack<kValue>(values[0], values[1]);
        const uint32_t second = pack<kValue>(values[2], values[3]);
        if constexpr (kWide) {
            bits = {bits_of(widen<kValue>(static_cast<uint16_t>(first))),
                    bits_of(widen<kValue>(static_cast<uint16_t>(first >> 16))),
                    bits_of(widen<kValue>(static_cast<uint16_t>(second))),
                    bits_of(widen<kValue>(static_cast<uint16_t>(second >> 16)))};
        } else {
            bits = {first, second, pack<kValue>(values[4], values[5]),
                    pack<kValue>(values[6], values[7])};
        }
    }
    store(static_cast<uint4*>(to), bits);
}

template <int kValue, bool kWide>
PF_DEVICE void dequantize_chunks(const Dequantize& d) {
    constexpr bool kNarrow = kValue != PF_FLOAT32 && !kWide;
    constexpr int kWidth = kNarrow ? 8 : 4;  // elements of a lane's 16-byte store
    constexpr int kItem = kNarrow ? 2 : 4;   // bytes of one
    constexpr int kSteps = kChunk / (kWarp * kWidth);
    static_assert(kCodes == kDequantizeThreads, "a thread copies one value of nested_code");

    using Word = std::conditional_t<kNarrow, uint32_t, uint16_t>;  // the codes of one store
    constexpr int kChunkWords = kChunk / kWidth;
    PF_SHARED(Word, staged, kDequantizeWarps * kStages * kChunkWords);
    PF_SHARED(float, code_values, kCodes);
    const Statistics& s = d.statistics;
    const int lane = thread() % kWarp;
    const int64_t chunks = d.n / kChunk;
    const int64_t stride = static_cast<int64_t>(blocks()) * kDequantizeWarps;
    int64_t chunk = static_cast<int64_t>(block()) * kDequantizeWarps + warp_of_thread();
    Word* const mine = staged + thread() / kWarp * (kStages * kChunkWords);

    // A commit a stage, of nothing where there is no chunk, so that counts stay in step.
    const uint64_t policy = once_policy();
    const auto fetch = [&](int64_t which, int stage) {
        if (which < chunks) {
            copy_async(reinterpret_cast<uint4*>(mine + stage * kChunkWords) + lane,
                       reinterpret_cast<const uint4*>(d.packed) + which * kWarp + lane,
                       policy);
        }
        copy_commit();
    };
    // A lane loads the scale of one of the chunk's blocks (of 32 at most).
    const int scales = s.block_shift < 10 ? kChunk >> s.block_shift : 1;
    const auto raw_scale_of = [&](int64_t which) {
        const int64_t first = which * kChunk >> s.block_shift;
        return which < chunks ? raw_scale(s, first + (lane & (scales - 1))) : RawScale{0, 0.0f};
    };

#pragma unroll
    for (int stage = 0; stage + 1 < kStages; ++stage) fetch(chunk + stage * stride, stage);
    RawScale ahead = raw_scale_of(chunk);
    const float offset = offset_of(s);
    if (s.nested_absmax) code_values[thread()] = load(s.nested_code + thread());
    const float entry = kTables[d.quant_type][lane % 16];
    sync_block();

    int stage = 0;
    for (; chunk < chunks; chunk += stride) {
        copy_wait<kStages - 2>();
        sync_warp();  // all lanes' bytes are there, and the stage before is read
        fetch(chunk + (kStages - 1) * stride, stage == 0 ? kStages - 1 : stage - 1);
        const float scale = scale_of(s, ahead, code_values, offset);
        ahead = raw_scale_of(chunk + stride);
        const Word* const words = mine + stage * kChunkWords;
        char* const out = static_cast<char*>(d.out) + (chunk * kChunk + lane * kWidth) * kItem;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int place = step * kWarp + lane;
            const uint32_t word = words[place];
            const float absmax = shuffle(scale, place * kWidth >> s.block_shift);
            float values[kWidth];
#pragma unroll
            for (int e = 0; e < kWidth; ++e) {
                values[e] = mul(shuffle(entry, word >> shift_of(e)), absmax);
            }
            store_values<kValue, kWide>(out + step * (kWarp * 16), values);
        }
        stage = stage + 1 < kStages ? stage + 1 : 0;
    }
    // The elements behind the last whole chunk are the next one's in this order.
    if (chunk == chunks) {
        dequantize_bytes(d, chunks * (kChunk / 2), (d.n + 1) / 2, kWarp);
    }
}

}  // namespace pf
