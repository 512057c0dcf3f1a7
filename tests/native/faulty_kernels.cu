// Kernels with one fault each, which cuda_emulation.h must find.
#include "../../csrc/cuda/device.cuh"

using namespace pf;

struct Operands {
    const uint8_t* in;
    uint32_t* out;
    int n;
};

PF_KERNEL(64, 1) sound(const Operands o) {
    PF_SHARED(uint32_t, values, 64);
    values[thread()] = load(o.in + thread());
    sync_block();
    store(o.out + thread(), values[63 - thread()]);
}

PF_KERNEL(64, 1) reads_outside(const Operands o) {
    store(o.out + thread(), static_cast<uint32_t>(load(o.in + thread() + 1)));
}

PF_KERNEL(64, 1) writes_outside(const Operands o) { store(o.out + thread() + 1, 7u); }

PF_KERNEL(64, 1) reads_off_a_boundary(const Operands o) {
    store(o.out + thread(), load_if(thread() == 0, o.in + 4).x);
}

PF_KERNEL(64, 1) writes_an_input(const Operands o) {
    store(const_cast<uint8_t*>(o.in) + thread(), uint8_t{0});
}

PF_KERNEL(64, 1) writes_twice(const Operands o) { store(o.out + thread() / 2 * 2, 7u); }

// The values of the other warp may not be there.
PF_KERNEL(64, 1) lacks_a_barrier(const Operands o) {
    PF_SHARED(uint32_t, values, 64);
    values[thread()] = load(o.in + thread());
    store(o.out + thread(), values[63 - thread()]);
}

PF_KERNEL(64, 1) does_not_wait_for_a_copy(const Operands o) {
    PF_SHARED(uint32_t, values, 16);
    if (thread() < 4) {
        copy_async(reinterpret_cast<uint4*>(values) + thread(),
                   reinterpret_cast<const uint4*>(o.in) + thread(), once_policy());
        copy_commit();
    }
    sync_block();
    store(o.out + thread(), values[thread() % 16]);
}

PF_KERNEL(64, 1) shuffles_in_a_branch(const Operands o) {
    float value = 1.0f;
    if (thread() % 2) value = shuffle(value, 0);
    store(o.out + thread(), bits_of(value));
}

PF_KERNEL(64, 1) diverges(const Operands o) {
    float value = 1.0f;
    if (thread() % 2) {
        value = shuffle(value, 0);
    } else {
        value = shuffle_xor(value, 1);
    }
    store(o.out + thread(), bits_of(value));
}

PF_KERNEL(64, 1) leaves_before_a_barrier(const Operands o) {
    if (thread() == 5) return;
    sync_block();
    store(o.out + thread(), 1u);
}

PF_KERNEL(64, 1) writes_behind_shared_memory(const Operands o) {
    PF_SHARED(uint32_t, values, 64);
    uint32_t* const all = values;
    all[thread() + 1] = 1;
    sync_block();
    store(o.out + thread(), all[thread()]);
}

extern "C" PF_EXPORT void run(void (*kernel)(Operands), const uint8_t* in, uint32_t* out) {
    const Operands o{in, out, 64};
    PF_LAUNCH(kernel, 1, 1, 64, nullptr, o);
}
