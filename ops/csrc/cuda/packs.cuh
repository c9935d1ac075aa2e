// Neighbouring values that one instruction loads or stores.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace grootvl::cuda {

template <typename scalar_t, int kWidth>
struct alignas(sizeof(scalar_t) * kWidth) Pack {
  scalar_t value[kWidth];
};

template <int kWidth, typename scalar_t>
__device__ Pack<scalar_t, kWidth> load_pack(const scalar_t* from) {
  return *reinterpret_cast<const Pack<scalar_t, kWidth>*>(from);
}

template <int kWidth, typename scalar_t, typename acc_t>
__device__ void store_pack(const acc_t (&values)[kWidth], scalar_t* to) {
  Pack<scalar_t, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    pack.value[i] = static_cast<scalar_t>(values[i]);
  }
  *reinterpret_cast<Pack<scalar_t, kWidth>*>(to) = pack;
}

// A result whose dtype is known when the kernel runs; all threads take the same branch.
struct AnyOutput {
  void* data;
  c10::ScalarType dtype;

  template <int kWidth, typename acc_t>
  __device__ void store(int64_t at, const acc_t (&values)[kWidth]) const {
    switch (dtype) {
      case c10::ScalarType::Half:
        return store_pack(values, static_cast<c10::Half*>(data) + at);
      case c10::ScalarType::BFloat16:
        return store_pack(values, static_cast<c10::BFloat16*>(data) + at);
      default:
        return store_pack(values, static_cast<acc_t*>(data) + at);
    }
  }
};

// Whether packs of `width` values may be loaded from rows that lie `stride` values apart.
template <typename scalar_t>
bool is_packed(const scalar_t* data, int64_t stride, int width) {
  return stride % width == 0 && reinterpret_cast<uintptr_t>(data) % (width * sizeof(scalar_t)) == 0;
}

}  // namespace grootvl::cuda
