// Scratch memory of an operator.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace grootvl::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Large pages from the operating system.
class LargePages {
 public:
  static constexpr size_t kSize = size_t(1) << 21;

  LargePages() = default;

  explicit LargePages(size_t bytes) : bytes_(rounded(bytes)) {
    void* const memory =
        mmap(nullptr, bytes_ + kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, /*offset=*/0);
    TORCH_CHECK(memory != MAP_FAILED, "not enough memory: cannot allocate ", bytes_, " bytes of scratch memory");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), aligned = rounded(begin);
    first_ = reinterpret_cast<char*>(aligned);
    unmap(static_cast<char*>(memory), aligned - begin);
    unmap(first_ + bytes_, begin + kSize - aligned);
    // Only a hint, so errors are ignored.
    madvise(first_, bytes_, MADV_HUGEPAGE);
  }

  LargePages(LargePages&& other) noexcept
      : first_(std::exchange(other.first_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

  LargePages& operator=(LargePages&& other) noexcept {
    std::swap(first_, other.first_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  ~LargePages() {
    shrink(0);
  }

  char* first() const {
    return first_;
  }

  size_t bytes() const {
    return bytes_;
  }

  // Returns all but the first `bytes` to the operating system.
  void shrink(size_t bytes) {
    const size_t kept = rounded(bytes);
    if (kept < bytes_) {
      unmap(first_ + kept, bytes_ - kept);
      bytes_ = kept;
    }
  }

 private:
  static size_t rounded(size_t bytes) {
    return (bytes + kSize - 1) / kSize * kSize;
  }

  static void unmap(char* first, size_t bytes) {
    if (bytes > 0) {
      munmap(first, bytes);
    }
  }

  char* first_ = nullptr;
  size_t bytes_ = 0;
};

// The pages that this thread has kept.
inline LargePages& reserve() {
  static thread_local LargePages pages;
  return pages;
}
#endif

// What happens to the scratch memory that a thread has kept from earlier calls, beyond what this call needs.
enum class Rest { kFreed, kKept };

// Uninitialized feature maps of one image, with a value of acc_t for each vertex and channel. A thread keeps large ones
// for its next call: the page faults of new memory take as long as the arithmetic of a backward pass, since the
// operating system has to clear the pages, and sometimes to move others to get large ones.
template <typename acc_t>
class Scratch {
 public:
  Scratch(int64_t maps, int64_t vertices, int64_t channels, Rest rest = Rest::kFreed)
      : vertices_(vertices), channels_(channels) {
    const size_t bytes = maps * vertices * channels * sizeof(acc_t);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (rest == Rest::kFreed) {
      reserve().shrink(bytes);
    }
    if (bytes >= 2 * LargePages::kSize) {
      pages_ = std::move(reserve());
      if (pages_.bytes() < bytes) {
        pages_.shrink(0);
        pages_ = LargePages(bytes);
      }
      first_ = reinterpret_cast<acc_t*>(pages_.first());
      return;
    }
#endif
    memory_ = c10::GetCPUAllocator()->allocate(bytes);
    first_ = static_cast<acc_t*>(memory_.get());
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

#if defined(__linux__) && defined(MADV_HUGEPAGE)
  ~Scratch() {
    if (pages_.bytes() > reserve().bytes()) {
      reserve() = std::move(pages_);
    }
  }
#endif

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
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  LargePages pages_;
#endif
  int64_t vertices_, channels_;
  c10::DataPtr memory_;
  acc_t* first_;
};

}  // namespace grootvl::cpu
