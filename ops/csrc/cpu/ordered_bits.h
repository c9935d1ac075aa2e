// Maps floating-point values to unsigned integers of the same order.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace grootvl::cpu {

template <typename value_t>
using OrderedBits = std::conditional_t<sizeof(value_t) == sizeof(uint64_t), uint64_t, uint32_t>;

// Adding zero turns -0 into 0. The largest integer is left free: no number, not even infinity, maps to it.
template <typename value_t>
inline OrderedBits<value_t> ordered_bits(value_t value) {
  using bits_t = OrderedBits<value_t>;
  static_assert(sizeof(value_t) == sizeof(bits_t));
  constexpr int kSign = 8 * sizeof(bits_t) - 1;
  value += 0;
  bits_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bits_t all_if_negative = bits_t{0} - (bits >> kSign);
  return bits ^ (all_if_negative | bits_t{1} << kSign);
}

}  // namespace grootvl::cpu
