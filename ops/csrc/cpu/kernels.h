// The kernels, compiled once for each instruction set, and the dispatch among them at run time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/compaction.h"
#include "cpu/isa.h"
#include "cpu/ordered_bits.h"
#include "cpu/rounding.h"
#include "cpu/types.h"
#include "scan.h"
#include "tree.h"

namespace grootvl::cpu::baseline {
using Compact = Compaction;
constexpr int kVectorBytes = 16;
#include "cpu/all_kernels-inl.h"
}  // namespace grootvl::cpu::baseline
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace grootvl::cpu::avx2 {
using Compact = Compaction;
constexpr int kVectorBytes = 32;
#include "cpu/all_kernels-inl.h"
}  // namespace grootvl::cpu::avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace grootvl::cpu::avx512 {
using Compact = CompactionAvx512;
constexpr int kVectorBytes = 64;
#include "cpu/all_kernels-inl.h"
}  // namespace grootvl::cpu::avx512
#pragma GCC pop_options
#else
namespace grootvl::cpu {
namespace avx2 = baseline;
namespace avx512 = baseline;
}  // namespace grootvl::cpu
#endif

namespace grootvl::cpu {

// Calls call(kernels) with the kernels of the best instruction set of this processor.
template <typename Call>
void with_kernels(const Call& call) {
  switch (isa()) {
    case Isa::kAvx512:
      return call(avx512::Kernels());
    case Isa::kAvx2:
      return call(avx2::Kernels());
    case Isa::kBaseline:
      return call(baseline::Kernels());
  }
}

}  // namespace grootvl::cpu
