// y = x W^T + bias for few rows of x ("tokens"), W in 4 bits and decoded in registers on its way.
//
//     y[t, r] = round(sum_k x[t, k] w[r, k] + bias[r])
//     w[r, k] = round(table[index[r, k]] * absmax[(r K + k) / block_size])
//
// Moves W once: 0.516 bytes an element for nested blocks of 64; x and y are small. For 14336 x 4096
// that is 30.3 MB: 15 us at 2.0 TB/s (A100), 9.0 us at 3.35 TB/s (H100).
//
// A block takes 16 rows of W; its eight warps take chunks of 128 columns in turn. A lane loads 16
// bytes, 32 columns, of row lane / 4 and of the row eight below it, its lane % 4th part of the
// chunk (64 bytes in a row for each row). Those are the operand of the tensor cores' product of 16
// rows by 16 columns by 8 tokens, with the columns in another order, which is harmless where x is
// loaded in the same one: lanes 4t to 4t + 3 load token t's, from L1. So 8 tokens cost as many
// instructions as one. float32 multiplies and adds by itself. The block's scales are decoded once,
// together, into shared memory; a row's are cut into segments where they are too many. The warps'
// sums are added in the order of the warps.
//
// In the machine code (nvcc 13.0) of the loop, for 128 elements a lane and up to 8 tokens: 538
// instructions on sm_80 and sm_100, 543 on sm_90: 4.2 an element, of which the look-up is 1
// shuffle, 0.9 shifts and 1 multiplication, and rounding 0.5. An SM issues 128 lanes' instructions
// a clock, 30 elements; the bandwidth asks for 25.5 (A100 at 1.41 GHz) and 28 (H100 at 1.755 GHz).
// The load-store unit is nearer its end: 128 clocks of shuffles, 32 of codes, 16 of x and some 12
// of scales for 4096 elements, 22 a clock, which is 86% and 78% of the two bandwidths. On their way
// are 1 to 2 KiB a warp, 24 to 48 KiB an SM, where the products of bandwidth and latency ask for
// some 20.
#pragma once

#include "nf4_values.cuh"

namespace pf {

struct Gemv {
    const void* x;
    const uint8_t* packed;
    Statistics statistics;
    int64_t m, n_out, k;
    int quant_type;
    int dtype;
    const void* bias;
    void* out;
    int segment;  // chunks of k whose scales are in shared memory together
    int pitch;    // floats from a row's scales to the next row's there
};

constexpr int kGemvWarps = 8;
constexpr int kGemvThreads = kGemvWarps * kWarp;
constexpr int kGroups = 2;      // of 8 rows of W, which a warp decodes beside each other
constexpr int kRows = 8 * kGroups;
constexpr int kScaleLanes = kGemvThreads / kRows;  // that decode the scales of one row
constexpr int kRun = 32;         // elements of 16 bytes: what a lane takes of a row at a time
constexpr int kSpan = 4 * kRun;  // a chunk: elements of a row that four lanes take
constexpr int kAhead = 2;        // chunks of a warp that are on their way
constexpr int kRound = kGemvWarps * kAhead;
constexpr int kMostScales = 252;  // of a row, in shared memory
constexpr int kScratch = kRows * kMostScales;
constexpr int kMostK = 1 << 30;  // of the fast kernels, whose k has 32 bits

constexpr int kAnyWarps = 8;
constexpr int kAnyThreads = kAnyWarps * kWarp;
constexpr int kAnyBlocks = 4;
constexpr int kAnyTokens = 4;

PF_DEVICE uint32_t word_of(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The scales of a row of W over one segment of k, by kScaleLanes threads, of which this is number
// `part`. All loads of a batch are under way before the first is used.
template <bool kNested>
PF_DEVICE void decode_scales(
    const Gemv& g, int64_t row, int segment, int part, const float* code_values, float offset,
    float* to) {
    constexpr int kBatch = 8, kStep = kBatch * kScaleLanes;
    const Statistics& s = g.statistics;
    const int64_t begin = row * g.k + static_cast<int64_t>(segment) * kSpan;
    const int64_t left = g.k - static_cast<int64_t>(segment) * kSpan;
    const int64_t most = static_cast<int64_t>(g.segment) * kSpan;
    const int64_t first = begin >> s.block_shift;
    const int64_t last = (begin + (left < most ? left : most) - 1) >> s.block_shift;
    int count = static_cast<int>(last - first) + 1 - part;
    to += part;
    if constexpr (kNested) {
        const uint8_t* codes = static_cast<const uint8_t*>(s.absmax) + first + part;
        // A row's scales here are fewer than 256: they have two scales of their own at most.
        const float near = load(s.nested_absmax + first / kNestedBlock);
        const float far = load(s.nested_absmax + last / kNestedBlock);
        int near_count = kNestedBlock - static_cast<int>(first % kNestedBlock) - part;
        for (; count > 0; count -= kStep, near_count -= kStep, codes += kStep, to += kStep) {
            uint32_t code[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                code[i] = i * kScaleLanes < count ? load(codes + i * kScaleLanes) : 0;
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const float outer = i * kScaleLanes < near_count ? near : far;
                const float scale = nested_scale(code_values[code[i]], outer, offset);
                if (i * kScaleLanes < count) to[i * kScaleLanes] = scale;
            }
        }
    } else {
        const float* scales = static_cast<const float*>(s.absmax) + first + part;
        for (; count > 0; count -= kStep, scales += kStep, to += kStep) {
            float scale[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                scale[i] = i * kScaleLanes < count ? load(scales + i * kScaleLanes) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (i * kScaleLanes < count) to[i * kScaleLanes] = scale[i];
            }
        }
    }
}

// Blocks of threads on one SM at a time, for which the compiler finds registers without a spill.
PF_BOTH constexpr int gemv_blocks(int tokens) { return tokens > 8 ? 2 : 3; }

template <int kDtype, int kTokens>
PF_DEVICE void gemv_rows(const Gemv& g) {
    constexpr bool kTensorCores = kDtype != PF_FLOAT32;
    constexpr int kItem = kTensorCores ? 2 : 4;
    static_assert(kCodes == kGemvThreads, "a thread copies one value of nested_code");
    static_assert(kTensorCores || kTokens == 4, "sums has room for four");
    static_assert(kGemvWarps * kRows * kTokens <= kScratch, "partial sums take the scales' place");

    PF_SHARED(float, code_values, kCodes);
    PF_SHARED(float, scratch, kScratch);
    const Statistics& s = g.statistics;
    // What is cheap to compute is computed where it is used: the loop has no register to spare.
    const auto quad_now = [] { return thread() % kWarp / 4; };
    const auto token_at = [](int token) { return static_cast<int64_t>(block()) * kTokens + token; };
    // Rows behind the last one are computed as copies of it, and not stored.
    const auto row_at = [&](int row) {
        const int64_t at = static_cast<int64_t>(block_y()) * kRows + row;
        return at < g.n_out ? at : g.n_out - 1;
    };
    const auto tokens_here = [&] {
        const int64_t left = g.m - token_at(0);
        return left < kTokens ? static_cast<int>(left) : kTokens;
    };
    const auto column_now = [] { return thread() / kWarp * kSpan + thread() % 4 * kRun; };
    const int quad = quad_now(), tokens = tokens_here();
    // A lane's place in its warp's first chunk: elements to the row's end, codes, x of token `quad`
    // (tensor cores) or of token 0.
    const int column = column_now();
    int left = static_cast<int>(g.k) - column;
    const uint8_t* codes[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        codes[group] = g.packed + (row_at(8 * group + quad) * g.k + column) / 2;
    }
    const char* x = static_cast<const char*>(g.x) +
                    (token_at(kTensorCores ? quad : 0) * g.k + column) * kItem;

    // Tensor cores: [eight tokens][element of the product]; else [group][token].
    constexpr int kSums = kTensorCores ? kTokens / 8 : kGroups;
    float sums[kSums][4];
#pragma unroll
    for (int i = 0; i < kSums * 4; ++i) sums[i / 4][i % 4] = 0.0f;
    uint4 ahead[kAhead][kGroups];
    const auto fetch = [&](int turn, int chunks) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            ahead[turn][group] =
                load_once_if(left > chunks * kSpan, codes[group] + chunks * (kSpan / 2));
        }
    };
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) fetch(turn, turn * kGemvWarps);
    const float offset = offset_of(s);
    if (s.nested_absmax) code_values[thread()] = load(s.nested_code + thread());
    const float entry = kTables[g.quant_type][thread() % 16];

    const int chunks = (static_cast<int>(g.k) + kSpan - 1) / kSpan;
    for (int segment = 0; segment < chunks; segment += g.segment) {
        sync_block();  // code_values are there; the scales of the segment before are read
        const int decoded = thread() / kScaleLanes, part = thread() % kScaleLanes;
        float* const scales = scratch + decoded * g.pitch;
        if (s.nested_absmax) {
            decode_scales<true>(g, row_at(decoded), segment, part, code_values, offset, scales);
        } else {
            decode_scales<false>(g, row_at(decoded), segment, part, code_values, offset, scales);
        }
        sync_block();

        int phase[kGroups];  // elements from the start of the segment's first block to this lane's
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int64_t begin =
                row_at(8 * group + quad_now()) * g.k + static_cast<int64_t>(segment) * kSpan;
            phase[group] =
                (static_cast<int>(begin) & ((1 << s.block_shift) - 1)) + column_now();
        }
        const int end = segment + g.segment < chunks ? segment + g.segment : chunks;
        for (int start = segment + warp_of_thread(); start < end; start += kRound) {
#pragma unroll
            for (int turn = 0; turn < kAhead; ++turn) {
                if (start + turn * kGemvWarps >= end) break;
                const bool live = left > turn * (kGemvWarps * kSpan);
                float scale[kGroups];
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    const int block =
                        (phase[group] + turn * (kGemvWarps * kSpan)) >> s.block_shift;
                    // No branch: behind a row's end any scale is read, and none used.
                    const float read = scratch[live ? (8 * group + quad) * g.pitch + block : 0];
                    scale[group] = live ? read : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const char* const at =
                        x + turn * (kGemvWarps * kSpan * kItem) + i * (8 * kItem);
                    float values[kGroups][8];
#pragma unroll
                    for (int j = 0; j < kGroups * 8; ++j) {
                        const uint32_t word = word_of(ahead[turn][j / 8], i);
                        values[j / 8][j % 8] =
                            mul(shuffle(entry, word >> shift_of(j % 8)), scale[j / 8]);
                    }
                    if constexpr (kTensorCores) {
                        // W is the left operand, its rows the groups' in turn. The order of k
                        // inside a product is free where x and W share it: a lane's eight elements
                        // stand for columns 2t, 2t + 1, 2t + 8, 2t + 9 of two products.
                        uint32_t w[kGroups][4];
#pragma unroll
                        for (int j = 0; j < kGroups * 4; ++j) {
                            const float* const pair = values[j / 4] + 2 * (j % 4);
                            w[j / 4][j % 4] = pack<kDtype>(pair[0], pair[1]);
                        }
#pragma unroll
                        for (int eight = 0; eight < kTokens / 8; ++eight) {
                            const uint4 v = load_if(
                                live && quad + 8 * eight < tokens, at + 8 * eight * kItem * g.k);
                            float(&sum)[4] = sums[eight];
                            mma<kDtype>(sum, w[0][0], w[1][0], w[0][1], w[1][1], v.x, v.y);
                            mma<kDtype>(sum, w[0][2], w[1][2], w[0][3], w[1][3], v.z, v.w);
                        }
                    } else {
#pragma unroll
                        for (int token = 0; token < kTokens; ++token) {
                            if (token >= tokens) break;
                            const char* const x_at = at + token * kItem * g.k;
                            const uint4 four[2] = {load_if(live, x_at), load_if(live, x_at + 16)};
#pragma unroll
                            for (int group = 0; group < kGroups; ++group) {
                                float part = 0.0f;  // short chains of sums round less
#pragma unroll
                                for (int j = 0; j < 8; ++j) {
                                    const float x_value = float_of(word_of(four[j / 4], j % 4));
                                    part = fma(values[group][j], x_value, part);
                                }
                                sums[group][token] = add(sums[group][token], part);
                            }
                        }
                    }
                }
                fetch(turn, turn * kGemvWarps + kRound);
            }
            left -= kRound * kSpan;
            x += kRound * kSpan * kItem;
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                codes[group] += kRound * (kSpan / 2);
                phase[group] += kRound * kSpan;
            }
        }
    }

    // Partial sums of the warps, [warp][group][token][row of the group], in the scales' place.
    const auto place = [](int warp, int group, int token, int row) {
        return ((warp * kGroups + group) * kTokens + token) * 8 + row;
    };
    sync_block();
    const int warp = thread() / kWarp, last_quad = quad_now(), last_slot = thread() % 4;
#pragma unroll
    for (int i = 0; i < kSums * 4; ++i) {
        float sum = sums[i / 4][i % 4];
        if constexpr (kTensorCores) {
            const int token = i / 4 * 8 + 2 * last_slot + i % 2;
            scratch[place(warp, i % 4 / 2, token, last_quad)] = sum;
        } else {
            sum = add(sum, shuffle_xor(sum, 1));
            sum = add(sum, shuffle_xor(sum, 2));
            if (last_slot == 0) scratch[place(warp, i / 4, i % 4, last_quad)] = sum;
        }
    }
    sync_block();
    const int token = thread() / kRows, row = thread() % kRows;
    const int64_t out_row = static_cast<int64_t>(block_y()) * kRows + row;
    if (token >= tokens_here() || out_row >= g.n_out) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kGemvWarps; ++i) sum = add(sum, scratch[place(i, row / 8, token, row % 8)]);
    if (g.bias) sum = add(sum, load_as_float(kDtype, g.bias, out_row));
    store_rounded(kDtype, g.out, token_at(token) * g.n_out + out_row, sum);
}

// Any K, any alignment: a warp a row of W, an element a lane and step, every access as narrow as
// its element.
PF_DEVICE void gemv_any(const Gemv& g) {
    const int lane = thread() % kWarp;
    const int64_t row = static_cast<int64_t>(block()) * kAnyWarps + thread() / kWarp;
    const int64_t first_token = static_cast<int64_t>(block_y()) * kAnyTokens;
    if (row >= g.n_out) return;
    const float entry = kTables[g.quant_type][lane % 16];
    float sums[kAnyTokens] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t base = 0; base < g.k; base += kWarp) {
        const int64_t column = base + lane, element = row * g.k + column;
        const bool live = column < g.k;
        const uint32_t both = live ? load(g.packed + element / 2) : 0;
        const float scale =
            live ? scale_at(g.statistics, element >> g.statistics.block_shift) : 0.0f;
        const uint32_t index = element % 2 ? both : both >> 4;
        const float value = round_to(g.dtype, mul(shuffle(entry, index), scale));
#pragma unroll
        for (int i = 0; i < kAnyTokens; ++i) {
            const int64_t token = first_token + i;
            if (live && token < g.m) {
                sums[i] = fma(load_as_float(g.dtype, g.x, token * g.k + column), value, sums[i]);
            }
        }
    }
    const float bias = g.bias ? load_as_float(g.dtype, g.bias, row) : 0.0f;
#pragma unroll
    for (int i = 0; i < kAnyTokens; ++i) {
        float sum = sums[i];
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
        if (g.bias) sum = add(sum, bias);
        if (lane == 0 && first_token + i < g.m) {
            store_rounded(g.dtype, g.out, (first_token + i) * g.n_out + row, sum);
        }
    }
}

}  // namespace pf
