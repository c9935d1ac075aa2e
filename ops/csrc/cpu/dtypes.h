// The types behind dtypes that are known when an operator runs.
#pragma once

#include <c10/core/ScalarType.h>

#include <type_traits>

namespace grootvl::cpu {

template <typename scalar_t>
using Accumulated = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Calls call(scalar_t(0)) for values of this dtype.
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

// The same for a dtype that may differ from scalar_t only where that is float32, and then has 16 bits.
template <typename scalar_t, typename Call>
void with_scalar_beside(c10::ScalarType dtype, const Call& call) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return with_scalar(dtype == c10::ScalarType::Double ? c10::ScalarType::Float : dtype, call);
  } else {
    return call(scalar_t(0));
  }
}

}  // namespace grootvl::cpu
