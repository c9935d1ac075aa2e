// Scratch memory of an operator.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <type_traits>

#include "cpu/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace grootvl::cpu {

// Uninitialized feature maps of one image, with a value of acc_t for each vertex and channel.
template <typename acc_t>
class Scratch {
 public:
  Scratch(int64_t maps, int64_t vertices, int64_t channels) : vertices_(vertices), channels_(channels) {
    const size_t bytes = maps * vertices * channels * sizeof(acc_t);
    if (bytes < 2 * kLargePage) {
      memory_ = c10::GetCPUAllocator()->allocate(bytes);
      first_ = static_cast<acc_t*>(memory_.get());
      return;
    }
    // Every call touches fresh pages of an allocation this large. With pages of 4 KiB, the page faults take longer than
    // the arithmetic of a backward pass.
    const size_t whole = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    memory_ = c10::GetCPUAllocator()->allocate(whole + kLargePage);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    const uintptr_t first = (address + kLargePage - 1) / kLargePage * kLargePage;
    first_ = reinterpret_cast<acc_t*>(first);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Only a hint, so errors are ignored.
    madvise(first_, whole, MADV_HUGEPAGE);
#endif
  }

  Rows<acc_t> operator[](int64_t map) const {
    return {first_ + map * vertices_ * channels_, channels_};
  }

  // The rows of a result if it is stored as acc_t, otherwise those of a scratch map.
  template <typename stored_t>
  Rows<acc_t> in_place_of(const Rows<stored_t>& result, int64_t map) const {
    if constexpr (std::is_same_v<stored_t, acc_t>) {
      return result;
    } else {
      return (*this)[map];
    }
  }

 private:
  static constexpr size_t kLargePage = size_t(1) << 21;

  int64_t vertices_, channels_;
  c10::DataPtr memory_;
  acc_t* first_;
};

}  // namespace grootvl::cpu
