// Values of 16 bits to float32 and back, in operations that the compiler can vectorise.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace grootvl::cpu {

struct Rounding {
  static float widen(float value) {
    return value;
  }

  static double widen(double value) {
    return value;
  }

  static float widen(c10::BFloat16 value) {
    return of_bits<float>(static_cast<uint32_t>(value.x) << 16);
  }

  static float widen(c10::Half value) {
    return static_cast<float>(value);
  }

  // To the nearest, ties to even.
  template <typename scalar_t, typename acc_t>
  static scalar_t round(acc_t value) {
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      const uint32_t bits = of_bits<uint32_t>(value);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      return c10::BFloat16(static_cast<uint16_t>(value == value ? rounded : 0x7fc0), c10::BFloat16::from_bits());
    } else {
      return static_cast<scalar_t>(value);
    }
  }

 private:
  template <typename To, typename From>
  static To of_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
};

}  // namespace grootvl::cpu
