// Layer norms of rows of channels, and what is added to a row before or behind them.

struct LayerNormKernels : Elementary {
  // Mean and 1 / sqrt(variance + eps) of a row, in two passes.
  template <typename scalar_t>
  static Moments<scalar_t> moments(const scalar_t* row, int64_t channels, scalar_t eps) {
    const scalar_t mean = sum(channels, [&](int64_t c) { return row[c]; }) / channels;
    const scalar_t square = sum(channels, [&](int64_t c) { return (row[c] - mean) * (row[c] - mean); });
    return {mean, 1 / std::sqrt(square / channels + eps)};
  }

  // Gradient of a row before a layer norm, in place of that behind it; adds to the gradients of weight and bias.
  template <typename scalar_t>
  static void norm_backward(
      const scalar_t* __restrict row,
      Moments<scalar_t> m,
      const scalar_t* __restrict weight,
      int64_t channels,
      scalar_t* __restrict grad,
      scalar_t* __restrict grad_weight,
      scalar_t* __restrict grad_bias) {
    const auto normal = [&](int64_t c) { return (row[c] - m.mean) * m.scale; };
    const scalar_t mean = sum(channels, [&](int64_t c) { return grad[c] * weight[c]; }) / channels;
    const scalar_t product = sum(channels, [&](int64_t c) { return grad[c] * weight[c] * normal(c); }) / channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      grad_weight[c] += grad[c] * normal(c);
      grad_bias[c] += grad[c];
      grad[c] = m.scale * (grad[c] * weight[c] - mean - normal(c) * product);
    }
  }

  // to = x + factor * branch, or x without a branch.
  template <typename scalar_t, typename branch_t, typename acc_t>
  static void add(
      const scalar_t* __restrict x,
      const branch_t* __restrict branch,
      acc_t factor,
      int64_t channels,
      scalar_t* __restrict sum,
      acc_t* __restrict row) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] = Rounding::round<scalar_t>(Rounding::widen(x[c]) + factor * Rounding::widen(branch[c]));
      // Rounded as it is stored, since the backward pass norms what is stored.
      row[c] = Rounding::widen(sum[c]);
    }
  }

  template <typename scalar_t, typename acc_t>
  static void widen_row(const scalar_t* __restrict from, int64_t channels, acc_t* __restrict row) {
    for (int64_t c = 0; c < channels; ++c) {
      row[c] = Rounding::widen(from[c]);
    }
  }

  // normed = LayerNorm(row)
  template <typename acc_t, typename normed_t>
  static void norm_row(
      const acc_t* __restrict row,
      const acc_t* __restrict weight,
      const acc_t* __restrict bias,
      acc_t eps,
      int64_t channels,
      normed_t* __restrict normed) {
    const Moments<acc_t> m = moments<acc_t>(row, channels, eps);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      normed[c] = Rounding::round<normed_t>((row[c] - m.mean) * m.scale * weight[c] + bias[c]);
    }
  }

  // grad_x = grad + grad_sum, and factor times that as the gradient of the branch; either may be missing.
  template <typename acc_t, typename scalar_t, typename branch_t>
  static void store_gradients(
      acc_t* __restrict grad,
      const scalar_t* __restrict grad_sum,
      acc_t factor,
      int64_t channels,
      scalar_t* __restrict grad_x,
      branch_t* __restrict grad_branch) {
    if (grad_sum != nullptr) {
      for (int64_t c = 0; c < channels; ++c) {
        grad[c] += Rounding::widen(grad_sum[c]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      grad_x[c] = Rounding::round<scalar_t>(grad[c]);
    }
    if (grad_branch != nullptr) {
      for (int64_t c = 0; c < channels; ++c) {
        grad_branch[c] = Rounding::round<branch_t>(factor * grad[c]);
      }
    }
  }
};
