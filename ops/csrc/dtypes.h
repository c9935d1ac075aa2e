// Rules for dtypes, and dispatch from dtypes to C++ types.
#pragma once

#include <c10/core/ScalarType.h>

#include <type_traits>

namespace grootvl {

// The type that kernels compute in.
template <typename scalar_t>
using Accumulated = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline c10::ScalarType accumulated_dtype(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Double ? c10::ScalarType::Double : c10::ScalarType::Float;
}

inline bool is_16_bit(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Half || dtype == c10::ScalarType::BFloat16;
}

// Calls call(scalar_t(0)) with the C++ type of a floating dtype.
template <typename Call>
void with_scalar(c10::ScalarType dtype, const Call& call) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return call(double(0));
    case c10::ScalarType::Half:
      return call(c10::Half(0));
    case c10::ScalarType::BFloat16:
      return call(c10::BFloat16(0));
    default:
      return call(float(0));
  }
}

// The same for a dtype that is that of scalar_t or, if scalar_t is float, a 16-bit one.
template <typename scalar_t, typename Call>
void with_same_or_16_bit(c10::ScalarType dtype, const Call& call) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return with_scalar(is_16_bit(dtype) ? dtype : c10::ScalarType::Float, call);
  } else {
    return call(scalar_t(0));
  }
}

}  // namespace grootvl
