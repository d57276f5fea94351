#include <cstdlib>
#include <new>

#include "cpu/isa.h"
#include "cpu/sequence/sequence.h"

namespace moestream {

const SequenceKernels& sequence_kernels() {
    switch (active_isa()) {
#if defined(__x86_64__)
        case Isa::avx512:
            return have_bf16_dots() ? kSequenceAvx512Bf16 : kSequenceAvx512;
        case Isa::avx2:
            return kSequenceAvx2;
#elif defined(__aarch64__)
        case Isa::neon:
            return kSequenceNeon;
#endif
        default:
            return kSequencePortable;
    }
}

namespace {

struct Scratch {
    float* memory = nullptr;
    int64_t size = 0;

    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory); }

    float* reserve(int64_t n) {
        if (n > size) {
            std::free(memory);
            memory = nullptr;
            size = 0;
            const size_t bytes = (static_cast<size_t>(n) * sizeof(float) + 63) / 64 * 64;
            memory = static_cast<float*>(std::aligned_alloc(64, bytes));
            if (memory == nullptr) throw std::bad_alloc();
            size = n;
        }
        return memory;
    }
};

}  // namespace

float* thread_scratch(int slot, int64_t n) {
    thread_local Scratch slots[2];
    return slots[slot].reserve(n);
}

}  // namespace moestream
