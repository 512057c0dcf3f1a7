// Parallel loops on the threads that the process has already.
#pragma once

#include <cstdint>

namespace pf {

// Call body(begin, end) on parts that cover [0, count), on up to `threads` threads. Parts are
// multiples of `grain` (the last one excepted), the least work that is worth handing out.
void parallel_for(
    int64_t count, int64_t grain, int threads, void (*body)(const void*, int64_t, int64_t),
    const void* context);

// The same for anything that can be called.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
    parallel_for(
        count, grain, threads,
        [](const void* context, int64_t begin, int64_t end) {
            (*static_cast<const Body*>(context))(begin, end);
        },
        &body);
}

const char* threading();

}  // namespace pf
