#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace moestream {

std::string_view isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::neon:
            return "neon";
        case Isa::portable:
            break;
    }
    return "portable";
}

IsaList supported_isas() {
    IsaList list{{}, 0};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        list.tiers[list.count++] = Isa::avx512;
    // F16C came before AVX2 on every CPU, and not every compiler can ask for it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        list.tiers[list.count++] = Isa::avx2;
#elif defined(__APPLE__) && defined(__aarch64__)
    list.tiers[list.count++] = Isa::neon;  // every Apple Silicon core has dot product and fp16
#elif defined(__linux__) && defined(__aarch64__)
    const unsigned long need = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
    if ((getauxval(AT_HWCAP) & need) == need) list.tiers[list.count++] = Isa::neon;
#endif
    list.tiers[list.count++] = Isa::portable;
    return list;
}

namespace {

Isa parse(std::string_view name) {
    for (Isa isa : {Isa::portable, Isa::neon, Isa::avx2, Isa::avx512})
        if (isa_name(isa) == name) return isa;
    throw std::invalid_argument("MOESTREAM_ISA must be portable, neon, avx2 or avx512, got '" + std::string(name) +
                                "'");
}

Isa choose() {
    const IsaList have = supported_isas();
    const char* cap = std::getenv("MOESTREAM_ISA");
    if (cap == nullptr || *cap == '\0') return have.tiers[0];
    const Isa limit = parse(cap);
    for (int i = 0; i < have.count; ++i)
        if (have.tiers[i] <= limit) return have.tiers[i];
    return Isa::portable;
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{choose()};
    return isa;
}

}  // namespace

Isa active_isa() { return active().load(std::memory_order_relaxed); }

bool have_bf16_dots() {
#if defined(__x86_64__)
    static const bool have = [] {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512bf16") != 0;
    }();
    return have;
#else
    return false;
#endif
}

void set_active_isa(std::string_view name) {
    const Isa wanted = parse(name);
    const IsaList have = supported_isas();
    for (int i = 0; i < have.count; ++i)
        if (have.tiers[i] == wanted) {
            active().store(wanted, std::memory_order_relaxed);
            return;
        }
    throw std::invalid_argument("this CPU does not support the tier '" + std::string(name) + "'");
}

}  // namespace moestream
