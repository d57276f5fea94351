// Which instruction tier the kernels use: the best the machine has, capped by MOESTREAM_ISA.
#pragma once
#include <string_view>

namespace moestream {

enum class Isa { portable, neon, avx2, avx512 };

std::string_view isa_name(Isa isa);

// Tiers compiled in and supported by this CPU, best first; never empty (portable is always there).
struct IsaList {
    Isa tiers[4];
    int count;
};
IsaList supported_isas();

// The tier in use. Reads MOESTREAM_ISA (portable, neon, avx2, avx512) once, on first use; a cap above
// what the CPU has gives the best it has. Throws std::invalid_argument for an unknown name.
Isa active_isa();

// Whether the CPU has AVX-512 dot products of bfloat16 pairs, which the tier avx512 uses if so.
bool have_bf16_dots();

// For tests: switch the tier at run time. Throws std::invalid_argument if unsupported.
void set_active_isa(std::string_view name);

}  // namespace moestream
