// Layer norm of a row of channels, and the residual connection before it.

struct LayerNormKernels : Elementary {
  // The sum of term(lanes, c) over registers of channels, in four accumulators to hide the latency of additions.
  template <typename acc_t, typename Term>
  __attribute__((always_inline)) static acc_t sum_vectors(int64_t channels, const Term& term) {
    using Lanes = Vector<acc_t>;
    constexpr int kSums = 4;
    typename Lanes::Values sums[kSums] = {};
    int64_t c = 0;
    for (; c + kSums * Lanes::kWidth <= channels; c += kSums * Lanes::kWidth) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        sums[i] += term(Lanes(), c + i * Lanes::kWidth);
      }
    }
    for (; c + Lanes::kWidth <= channels; c += Lanes::kWidth) {
      sums[0] += term(Lanes(), c);
    }
    acc_t rest = 0;
    for (; c < channels; ++c) {
      rest += term(Single<acc_t>(), c);
    }
    return Lanes::sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  }

  // Mean and 1 / sqrt(variance + eps) of a row, in two passes.
  template <typename acc_t, typename scalar_t>
  static Moments<acc_t> moments(const scalar_t* row, int64_t channels, acc_t eps) {
    const acc_t mean = sum_vectors<acc_t>(
                           channels,
                           [&](auto lanes, int64_t c) __attribute__((always_inline)) {
                             typename decltype(lanes)::Values value;
                             lanes.load(row + c, value);
                             return value;
                           }) /
                       channels;
    const acc_t square = sum_vectors<acc_t>(channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
      typename decltype(lanes)::Values value;
      lanes.load(row + c, value);
      value -= mean;
      return value * value;
    });
    return {mean, 1 / std::sqrt(square / channels + eps)};
  }

  // sum = x + factor * branch
  template <typename scalar_t, typename branch_t, typename acc_t>
  static void add(const scalar_t* x, const branch_t* branch, acc_t factor, int64_t channels, scalar_t* sum) {
    for_each_vector<acc_t>(channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
      typename decltype(lanes)::Values value, added;
      lanes.load(x + c, value);
      lanes.load(branch + c, added);
      value += factor * added;
      lanes.store(value, sum + c);
    });
  }

  // normed = LayerNorm(row)
  template <typename scalar_t, typename acc_t, typename normed_t>
  static void norm(
      const scalar_t* row, const acc_t* weight, const acc_t* bias, acc_t eps, int64_t channels, normed_t* normed) {
    const Moments<acc_t> m = moments<acc_t>(row, channels, eps);
    for_each_vector<acc_t>(channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
      typename decltype(lanes)::Values value, factor, shift;
      lanes.load(row + c, value);
      lanes.load(weight + c, factor);
      lanes.load(bias + c, shift);
      value = (value - m.mean) * m.scale * factor + shift;
      lanes.store(value, normed + c);
    });
  }

  // grad_x = gradient of the row, from `grad`, that of its layer norm, + grad_sum; grad_branch = factor * grad_x; adds
  // to grad_weight and grad_bias. grad_sum and grad_branch may be null, grad_x may alias grad.
  template <typename scalar_t, typename grad_t, typename branch_t, typename acc_t>
  static void norm_backward(
      const scalar_t* row,
      Moments<acc_t> m,
      const acc_t* weight,
      int64_t channels,
      const grad_t* grad,
      const scalar_t* grad_sum,
      acc_t factor,
      scalar_t* grad_x,
      branch_t* grad_branch,
      acc_t* grad_weight,
      acc_t* grad_bias) {
    const acc_t mean = sum_vectors<acc_t>(
                           channels,
                           [&](auto lanes, int64_t c) __attribute__((always_inline)) {
                             typename decltype(lanes)::Values of_normed, scale;
                             lanes.load(grad + c, of_normed);
                             lanes.load(weight + c, scale);
                             return of_normed * scale;
                           }) /
                       channels;
    const acc_t product = sum_vectors<acc_t>(
                              channels,
                              [&](auto lanes, int64_t c) __attribute__((always_inline)) {
                                typename decltype(lanes)::Values of_normed, scale, value;
                                lanes.load(grad + c, of_normed);
                                lanes.load(weight + c, scale);
                                lanes.load(row + c, value);
                                return of_normed * scale * ((value - m.mean) * m.scale);
                              }) /
                          channels;
    for_each_vector<acc_t>(channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
      using Values = typename decltype(lanes)::Values;
      Values of_normed, scale, value, of_weight, of_bias;
      lanes.load(grad + c, of_normed);
      lanes.load(weight + c, scale);
      lanes.load(row + c, value);
      lanes.load(grad_weight + c, of_weight);
      lanes.load(grad_bias + c, of_bias);
      const Values normal = (value - m.mean) * m.scale;
      of_weight += of_normed * normal;
      of_bias += of_normed;
      lanes.store(of_weight, grad_weight + c);
      lanes.store(of_bias, grad_bias + c);
      Values of_row = m.scale * (of_normed * scale - mean - normal * product);
      if (grad_sum != nullptr) {
        lanes.load(grad_sum + c, value);
        of_row += value;
      }
      lanes.store(of_row, grad_x + c);
      if (grad_branch != nullptr) {
        of_row *= factor;
        lanes.store(of_row, grad_branch + c);
      }
    });
  }
};
