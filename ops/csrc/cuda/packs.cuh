// Packs of neighbouring channels that are moved together: stored in any floating type, computed in float32 or float64.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"

namespace grootvl::cuda {

// The accumulation type.
template <typename storage_t>
using Computed = std::conditional_t<std::is_same_v<storage_t, double>, double, float>;

// The storage type of intermediate results, which may exceed the range of float16.
template <typename storage_t>
using Between = std::conditional_t<std::is_same_v<storage_t, c10::Half>, float, storage_t>;

// The channels that a lane moves at once if the rows allow it.
constexpr int kMostPacked = 4;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];

  __device__ T& operator[](int i) {
    return value[i];
  }
  __device__ const T& operator[](int i) const {
    return value[i];
  }
};

template <int kWidth, typename T>
__device__ Pack<T, kWidth> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}

template <typename To, typename From, int kWidth>
__device__ Pack<To, kWidth> convert(const Pack<From, kWidth>& from) {
  Pack<To, kWidth> to;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
  return to;
}

template <typename T, typename acc_t, int kWidth>
__device__ void store_pack(T* to, const Pack<acc_t, kWidth>& values) {
  *reinterpret_cast<Pack<T, kWidth>*>(to) = convert<T>(values);
}

// One value for each channel: of(i) for the i-th.
template <typename acc_t, int kWidth, typename Of>
__device__ Pack<acc_t, kWidth> make_pack(const Of& of) {
  Pack<acc_t, kWidth> values;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values[i] = of(i);
  }
  return values;
}

// Whether kernels can read the rows in their dtype: 16-bit rows only in whole packs.
inline bool computes_rows(const at::Tensor& rows) {
  return rows.element_size() > 2 || rows.size(2) % kMostPacked == 0;
}

// Calls run(type, pack) for rows (B, L, C) that kernels can read in their dtype: a value of the stored type, and the
// number of channels of a pack as a type.
template <typename Run>
void for_rows(const at::Tensor& rows, const Run& run) {
  using One = std::integral_constant<int, 1>;
  using Packed = std::integral_constant<int, kMostPacked>;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "rows of channels", [&] {
    if constexpr (sizeof(scalar_t) < sizeof(float)) {
      run(scalar_t(), Packed());
    } else if constexpr (sizeof(scalar_t) > sizeof(float)) {
      run(scalar_t(), One());
    } else if (rows.size(2) % kMostPacked == 0) {
      run(scalar_t(), Packed());
    } else {
      run(scalar_t(), One());
    }
  });
}

// Evenly strided rows of channels, as in a slice of a projection's output.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;

  __device__ T* operator[](int64_t row) const {
    return first + row * stride;
  }
};

// Whether the rows (B, L, C) of a tensor are evenly strided and their channels have stride 1.
inline bool has_even_rows(const at::Tensor& tensor) {
  return (tensor.size(2) == 1 || tensor.stride(2) == 1) &&
         (tensor.size(0) == 1 || tensor.stride(0) == tensor.size(1) * tensor.stride(1));
}

// Whether packs of `width` elements can be read from the start of a tensor; views may start anywhere.
inline bool starts_pack(const at::Tensor& tensor, int64_t width) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (width * tensor.element_size()) == 0;
}

// The tensor if its rows (B, L, C) can be read `width` channels at a time, otherwise a copy.
inline at::Tensor readable_rows(const at::Tensor& tensor, int64_t width) {
  if (has_even_rows(tensor) && tensor.stride(1) % width == 0 && starts_pack(tensor, width)) {
    return tensor;
  }
  // contiguous() and clone() may keep any stride of a dimension of size 1.
  return tensor.clone(at::MemoryFormat::Contiguous);
}

// The tensor if it is contiguous and can be read `width` elements at a time, otherwise a copy.
inline at::Tensor readable_vector(const at::Tensor& tensor, int64_t width) {
  const at::Tensor dense = tensor.contiguous();
  return starts_pack(dense, width) ? dense : dense.clone();
}

template <typename T>
Rows<const T> rows_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(1)};
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

// A result whose dtype is known only at run time; all threads take the same branch.
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

// Whether packs of `width` values can be loaded from rows with this stride.
template <typename scalar_t>
bool is_packed(const scalar_t* data, int64_t stride, int width) {
  return stride % width == 0 && reinterpret_cast<uintptr_t>(data) % (width * sizeof(scalar_t)) == 0;
}

}  // namespace grootvl::cuda
