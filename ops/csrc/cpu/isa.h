// The instruction sets that kernels are compiled for, and the choice at run time.
#pragma once

#include <cstdlib>
#include <string_view>

namespace grootvl::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set that this processor supports. The environment variable GROOTVL_CPU_ISA=baseline|avx2|avx512
// forces a lower one, for tests and benchmarks.
inline Isa choose_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* asked = std::getenv("GROOTVL_CPU_ISA");
  const std::string_view limit = asked ? asked : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") {
    return Isa::kAvx512;
  }
  if (avx2 && limit != "baseline") {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace grootvl::cpu
