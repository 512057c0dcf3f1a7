// Linking an OpenMP runtime here could load a second one into the process, whose idle threads fight
// for the cores with the first one's. So the runtime that torch has loaded is looked up by its entry
// point, which GCC's, LLVM's and Intel's runtimes share; without one, threads are made per call.

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace pf {
namespace {

constexpr int kMostThreads = 1024;
constexpr int64_t kPartsPerThread = 4;  // so that a thread that is held up does not hold up all

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
    if (void* entry = dlsym(RTLD_DEFAULT, "GOMP_parallel")) {
        return reinterpret_cast<GompParallel>(entry);
    }
#if defined(RTLD_NOLOAD)
    // Not among the global symbols: then among those that torch itself was linked with.
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD)) {
        return reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
    }
#endif
    return nullptr;
}

GompParallel openmp() {
    static const GompParallel found = find_openmp();
    return found;
}

struct Work {
    void (*body)(const void*, int64_t, int64_t);
    const void* context;
    int64_t count;
    int64_t part;
    std::atomic<int64_t> next;
};

// Take parts until none is left, however many threads do the same.
void take_parts(void* argument) {
    Work& work = *static_cast<Work*>(argument);
    for (;;) {
        const int64_t begin = work.next.fetch_add(work.part, std::memory_order_relaxed);
        if (begin >= work.count) return;
        work.body(work.context, begin, std::min(begin + work.part, work.count));
    }
}

void* thread_main(void* argument) {
    take_parts(argument);
    return nullptr;
}

void run_threads(Work& work, int threads) {
    pthread_t helpers[kMostThreads];
    int started = 0;
    while (started < threads - 1 &&
           pthread_create(&helpers[started], nullptr, thread_main, &work) == 0) {
        ++started;
    }
    take_parts(&work);
    for (int i = 0; i < started; ++i) pthread_join(helpers[i], nullptr);
}

}  // namespace

void parallel_for(
    int64_t count, int64_t grain, int threads, void (*body)(const void*, int64_t, int64_t),
    const void* context) {
    if (count <= 0) return;
    threads = std::min(std::max(threads, 1), kMostThreads);
    const int64_t grains = (count + grain - 1) / grain;
    threads = static_cast<int>(std::min<int64_t>(threads, grains));
    if (threads == 1) {
        body(context, 0, count);
        return;
    }
    const int64_t parts = std::min<int64_t>(grains, threads * kPartsPerThread);
    const int64_t part = (grains + parts - 1) / parts * grain;
    Work work{body, context, count, part, {0}};
    if (const GompParallel parallel = openmp()) {
        parallel(take_parts, &work, static_cast<unsigned>(threads), 0);
    } else {
        run_threads(work, threads);
    }
}

const char* threading() { return openmp() ? "OpenMP" : "threads"; }

}  // namespace pf
