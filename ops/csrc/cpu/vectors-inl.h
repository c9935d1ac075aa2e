// Explicit vector registers, for loops in which the compiler would keep arrays of sums in memory.

// One register of values. Loops over its lanes must not be unrolled, or they would not be vectorized.
template <typename acc_t>
struct Vector {
  static constexpr int kWidth = kVectorBytes / sizeof(acc_t);
  typedef acc_t Values __attribute__((vector_size(kVectorBytes)));

  template <typename scalar_t>
  __attribute__((always_inline)) static void load(const scalar_t* from, Values& to) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      std::memcpy(&to, from, sizeof(to));
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      Halves halves;
      std::memcpy(&halves, from, sizeof(halves));
      const Words words = __builtin_convertvector(halves, Words) << 16;
      std::memcpy(&to, &words, sizeof(to));
    } else {
      acc_t values[kWidth];
#pragma GCC unroll 1
      for (int i = 0; i < kWidth; ++i) {
        values[i] = Rounding::widen(from[i]);
      }
      std::memcpy(&to, values, sizeof(to));
    }
  }

  template <typename scalar_t>
  __attribute__((always_inline)) static void store(const Values& values, scalar_t* to) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      std::memcpy(to, &values, sizeof(values));
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      // The same as Rounding::round.
      Words words;
      std::memcpy(&words, &values, sizeof(words));
      words = (words + 0x7fff + (words >> 16 & 1)) >> 16;
      words = values == values ? words : Words{} + 0x7fc0;
      const Halves halves = __builtin_convertvector(words, Halves);
      std::memcpy(to, &halves, sizeof(halves));
    } else {
      acc_t wide[kWidth];
      std::memcpy(wide, &values, sizeof(values));
#pragma GCC unroll 1
      for (int i = 0; i < kWidth; ++i) {
        to[i] = Rounding::round<scalar_t>(wide[i]);
      }
    }
  }

  __attribute__((always_inline)) static acc_t sum(const Values& values) {
    acc_t lanes[kWidth];
    std::memcpy(lanes, &values, sizeof(values));
    return Elementary::add_lanes<kWidth>(lanes);
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
};

// The same interface for a single value, for the remainder that does not fill a register.
template <typename acc_t>
struct Single {
  static constexpr int kWidth = 1;
  using Values = acc_t;

  template <typename scalar_t>
  static void load(const scalar_t* from, Values& to) {
    to = Rounding::widen(*from);
  }

  template <typename scalar_t>
  static void store(const Values& value, scalar_t* to) {
    *to = Rounding::round<scalar_t>(value);
  }

  static acc_t sum(const Values& value) {
    return value;
  }
};

// Calls visit(lanes, c) for each register of values, which starts at c, and for each value of the remainder.
template <typename acc_t, typename Visit>
__attribute__((always_inline)) inline void for_each_vector(int64_t count, const Visit& visit) {
  int64_t c = 0;
  for (; c + Vector<acc_t>::kWidth <= count; c += Vector<acc_t>::kWidth) {
    visit(Vector<acc_t>(), c);
  }
  for (; c < count; ++c) {
    visit(Single<acc_t>(), c);
  }
}
