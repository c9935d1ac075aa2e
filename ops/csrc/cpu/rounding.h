// Conversions between 16-bit types and float32 that the compiler can vectorize.
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
    const uint32_t sign = static_cast<uint32_t>(value.x & 0x8000) << 16, rest = static_cast<uint32_t>(value.x & 0x7fff)
                                                                                << 13;
    // Correct for the different exponent biases; the product is exact, also for subnormal numbers.
    const uint32_t scaled = of_bits<uint32_t>(of_bits<float>(rest) * 0x1p112f);
    // Infinity and NaN stay so.
    return of_bits<float>(sign | scaled | (rest >= 0x0f800000 ? 0x7f800000 : 0));
  }

  // Rounds to nearest, ties to even.
  template <typename scalar_t, typename acc_t>
  static scalar_t round(acc_t value) {
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      const uint32_t bits = of_bits<uint32_t>(value);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      return c10::BFloat16(static_cast<uint16_t>(value == value ? rounded : 0x7fc0), c10::BFloat16::from_bits());
    } else if constexpr (std::is_same_v<scalar_t, c10::Half>) {
      const uint32_t bits = of_bits<uint32_t>(value), sign = bits & 0x80000000, rest = bits ^ sign;
      // Changes the exponent bias and adds half a unit in the last place, a little less if the result is even.
      const uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
      // Below 2^-14, adding 1/2 rounds to a multiple of 2^-24 and leaves the multiplier in the low bits.
      const uint32_t subnormal = of_bits<uint32_t>(of_bits<float>(rest) + 0.5f) - of_bits<uint32_t>(0.5f);
      const uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
      const uint32_t rounded = rest < 0x38800000 ? subnormal : rest >= 0x47800000 ? large : normal;
      return c10::Half(static_cast<uint16_t>(rounded | sign >> 16), c10::Half::from_bits());
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
