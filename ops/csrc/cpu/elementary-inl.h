// Elementary functions and sums that the compiler can vectorize, unlike std::exp and std::log1p. In float32 the
// relative error is below 3e-7; in float64, which only tests use, they call the standard library.

struct Elementary {
  // Sums use this many lanes on every instruction set, so that they are rounded in the same way.
  static constexpr int kLanes = 16;

  // The sum of value(c) for c in 0..count-1. The remainder is padded with zeros, so that the sums stay in registers.
  template <typename Value>
  static auto sum(int64_t count, const Value& value) {
    using scalar_t = decltype(value(int64_t(0)));
    scalar_t lane[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        lane[i] += value(c + i);
      }
    }
    if (c < count) {
      scalar_t rest[kLanes] = {};
      for (int i = 0; c + i < count; ++i) {
        rest[i] = value(c + i);
      }
      for (int i = 0; i < kLanes; ++i) {
        lane[i] += rest[i];
      }
    }
    return add_lanes(lane);
  }

  template <int kCount = kLanes, typename scalar_t>
  __attribute__((always_inline)) static scalar_t add_lanes(const scalar_t* lane) {
    if constexpr (kCount == 1) {
      return *lane;
    } else {
      scalar_t half[kCount / 2];
      for (int i = 0; i < kCount / 2; ++i) {
        half[i] = lane[i] + lane[i + kCount / 2];
      }
      return add_lanes<kCount / 2>(half);
    }
  }

  // e^x as 2^k times a polynomial on [-ln(2)/2, ln(2)/2]; e^-87 below -87, infinity above 88.7.
  static float exponential(float x) {
    const float bounded = std::min(std::max(x, -87.0f), 89.0f);
    // Adding 1.5 * 2^23 rounds to an integer, which is left in the low bits.
    const float shifted = bounded * 1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const int32_t exponent = bits_of(shifted) - bits_of(12582912.0f);
    const float r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
    // In two factors, since 2^128 is not a float.
    const int32_t half = exponent >> 1;
    return near_zero(r) * power_of_two(half) * power_of_two(exponent - half);
  }

  static double exponential(double x) {
    return std::exp(x);
  }

  // The same for x <= 0, but faster: the result is at most 1, so that one factor 2^k suffices. e^-87 below -87.
  static float exponential_of_negative(float x) {
    const float bounded = std::max(x, -87.0f);
    // Leaves k + 127 in the low bits; shifted into the exponent field, it is 2^k.
    const float shifted = bounded * 1.44269504f + (12582912.0f + 127.0f);
    const float k = shifted - (12582912.0f + 127.0f);
    const float r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
    return near_zero(r) * float_of(static_cast<uint32_t>(bits_of(shifted)) << 23);
  }

  static double exponential_of_negative(double x) {
    return std::exp(x);
  }

  // log(1 + t) for 0 <= t <= 1: t times a polynomial in t - 1/2.
  static float log_one_plus(float t) {
    const float s = t - 0.5f;
    float p = 5.2534579299e-03f;
    p = p * s - 8.5746757686e-03f;
    p = p * s + 1.1576096527e-02f;
    p = p * s - 2.0228153095e-02f;
    p = p * s + 3.6635480821e-02f;
    p = p * s - 6.7711457610e-02f;
    p = p * s + 1.3260900974e-01f;
    p = p * s - 2.8852665424e-01f;
    p = p * s + 8.1093019247e-01f;
    return p * t;
  }

  static double log_one_plus(double t) {
    return std::log1p(t);
  }

  template <typename scalar_t>
  static scalar_t sigmoid(scalar_t x) {
    return sigmoid(x, exponential_of_negative(-std::abs(x)));
  }

  // The same, given e = e^-|x|.
  template <typename scalar_t>
  static scalar_t sigmoid(scalar_t x, scalar_t e) {
    return (x < 0 ? e : scalar_t(1)) / (scalar_t(1) + e);
  }

  template <typename scalar_t>
  static scalar_t softplus(scalar_t x, scalar_t e) {
    return std::max(x, scalar_t(0)) + log_one_plus(e);
  }

 private:
  static int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }

  static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  static float power_of_two(int32_t k) {
    return float_of(static_cast<uint32_t>(k + 127) << 23);
  }

  // e^r on [-ln(2)/2, ln(2)/2].
  static float near_zero(float r) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
  }
};
