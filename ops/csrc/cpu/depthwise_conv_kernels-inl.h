// The depth-wise 3x3 convolution of a row of a channels-last image.

struct DepthwiseConvKernels : Elementary {
  // Neighbouring positions that are summed together.
  static constexpr int kPositions = 4;

  // Calls finish(column, count, channel, sums) for blocks of the middle row: `sums` (kPositions, channels of the block)
  // is the convolution at `count` positions from `column` on. weight is (9, channels).
  template <typename scalar_t, typename acc_t, typename Finish>
  static void convolve_row(const ConvolutionRows<scalar_t>& in, const acc_t* weight, const Finish& finish) {
    for (int64_t column = 0; column < in.width; column += kPositions) {
      const scalar_t* from[3][kPositions + 2];
      for (int r = 0; r < 3; ++r) {
        for (int p = 0; p < kPositions + 2; ++p) {
          from[r][p] = in.position(r, column + p - 1);
        }
      }
      const int count = static_cast<int>(std::min<int64_t>(kPositions, in.width - column));
      int64_t c = 0;
      for (; c + Vector<acc_t>::kWidth <= in.channels; c += Vector<acc_t>::kWidth) {
        convolve_block<Vector<acc_t>>(from, weight, in.channels, column, count, c, finish);
      }
      for (; c < in.channels; ++c) {
        convolve_block<Single<acc_t>>(from, weight, in.channels, column, count, c, finish);
      }
    }
  }

  template <typename Lanes, typename scalar_t, typename acc_t, typename Finish>
  static void convolve_block(
      const scalar_t* const (&from)[3][kPositions + 2],
      const acc_t* weight,
      int64_t channels,
      int64_t column,
      int count,
      int64_t channel,
      const Finish& finish) {
    typename Lanes::Values sums[kPositions] = {}, taps[3], values;
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
      for (int tap = 0; tap < 3; ++tap) {
        Lanes::load(weight + (3 * r + tap) * channels + channel, taps[tap]);
      }
#pragma GCC unroll 6
      for (int p = 0; p < kPositions + 2; ++p) {
        Lanes::load(from[r][p] + channel, values);
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
          if (0 <= p - tap && p - tap < kPositions) {
            sums[p - tap] += taps[tap] * values;
          }
        }
      }
    }
    acc_t results[kPositions * Lanes::kWidth];
    std::memcpy(results, sums, sizeof(results));
    finish(column, count, channel, results);
  }

  template <typename Array>
  static constexpr int extent = std::extent_v<std::remove_reference_t<Array>>;

  // Load and store blocks of the shape that `finish` gets; positions after `count` are loaded as 0.
  template <typename scalar_t, size_t kSize>
  static void load_positions(const scalar_t* from, int64_t stride, int count, scalar_t (&values)[kSize]) {
    constexpr size_t kWidth = kSize / kPositions;
    for (int p = 0; p < kPositions; ++p) {
      if (p < count) {
        std::memcpy(values + p * kWidth, from + p * stride, kWidth * sizeof(scalar_t));
      } else {
        std::fill_n(values + p * kWidth, kWidth, scalar_t(0));
      }
    }
  }

  template <typename scalar_t, size_t kSize>
  static void store_positions(const scalar_t (&values)[kSize], int64_t stride, int count, scalar_t* to) {
    constexpr size_t kWidth = kSize / kPositions;
    for (int p = 0; p < count; ++p) {
      std::memcpy(to + p * stride, values + p * kWidth, kWidth * sizeof(scalar_t));
    }
  }

  // One row of y = SiLU(convolution).
  template <typename scalar_t, typename acc_t>
  static void convolve(const ConvolutionRows<scalar_t>& in, const acc_t* weight, scalar_t* y) {
    convolve_row(in, weight, [&](int64_t column, int count, int64_t channel, const auto& z) {
      constexpr int kCount = extent<decltype(z)>;
      scalar_t results[kCount];
#pragma GCC unroll 1
      for (int i = 0; i < kCount; ++i) {
        results[i] = Rounding::round<scalar_t>(z[i] * sigmoid(z[i]));
      }
      store_positions(results, in.channels, count, y + column * in.channels + channel);
    });
  }

  // One row (width, channels) of the gradient before SiLU, from that of y.
  template <typename scalar_t, typename acc_t>
  static void silu_backward(
      const ConvolutionRows<scalar_t>& in,
      const acc_t* weight,
      const scalar_t* grad_y,
      int64_t grad_stride,
      acc_t* grad) {
    convolve_row(in, weight, [&](int64_t column, int count, int64_t channel, const auto& z) {
      constexpr int kCount = extent<decltype(z)>;
      scalar_t of_y[kCount];
      load_positions(grad_y + column * grad_stride + channel, grad_stride, count, of_y);
      acc_t results[kCount];
#pragma GCC unroll 1
      for (int i = 0; i < kCount; ++i) {
        const acc_t sig = sigmoid(z[i]);
        results[i] = Rounding::widen(of_y[i]) * sig * (1 + z[i] * (1 - sig));
      }
      store_positions(results, in.channels, count, grad + column * in.channels + channel);
    });
  }

  // One row of the gradient of x, from the gradient before SiLU: the convolution with reversed taps.
  template <typename scalar_t, typename acc_t>
  static void convolve_backward(const ConvolutionRows<acc_t>& grad, const acc_t* reversed, scalar_t* grad_x) {
    convolve_row(grad, reversed, [&](int64_t column, int count, int64_t channel, const auto& sums) {
      constexpr int kCount = extent<decltype(sums)>;
      scalar_t results[kCount];
#pragma GCC unroll 1
      for (int i = 0; i < kCount; ++i) {
        results[i] = Rounding::round<scalar_t>(sums[i]);
      }
      store_positions(results, grad.channels, count, grad_x + column * grad.channels + channel);
    });
  }

  // Adds the contribution of one row to the gradient of the weight (9, channels).
  template <typename scalar_t, typename acc_t>
  static void weight_backward(const ConvolutionRows<scalar_t>& in, const acc_t* grad, acc_t* grad_weight) {
    int64_t c = 0;
    for (; c + Vector<acc_t>::kWidth <= in.channels; c += Vector<acc_t>::kWidth) {
      weight_backward_block<Vector<acc_t>>(in, grad, c, grad_weight);
    }
    for (; c < in.channels; ++c) {
      weight_backward_block<Single<acc_t>>(in, grad, c, grad_weight);
    }
  }

  template <typename Lanes, typename scalar_t, typename acc_t>
  static void weight_backward_block(
      const ConvolutionRows<scalar_t>& in, const acc_t* grad, int64_t channel, acc_t* grad_weight) {
    using Values = typename Lanes::Values;
    for (int r = 0; r < 3; ++r) {
      if (in.row[r] == nullptr) {
        continue;
      }
      Values sums[3] = {}, before = {}, at, behind, value;
      const scalar_t* from = in.row[r] + channel;
      const acc_t* of_z = grad + channel;
      Lanes::load(of_z, at);
      // x at `column` is multiplied by the gradients to its right (tap 0), at it, and to its left (tap 2).
      for (int64_t column = 0; column < in.width; ++column) {
        behind = Values{};
        if (column + 1 < in.width) {
          Lanes::load(of_z + (column + 1) * in.channels, behind);
        }
        Lanes::load(from + column * in.stride, value);
        sums[0] += value * behind;
        sums[1] += value * at;
        sums[2] += value * before;
        before = at;
        at = behind;
      }
      for (int tap = 0; tap < 3; ++tap) {
        acc_t* to = grad_weight + (3 * r + tap) * in.channels + channel;
        acc_t total[Lanes::kWidth], of_row[Lanes::kWidth];
        std::memcpy(total, to, sizeof(total));
        std::memcpy(of_row, sums + tap, sizeof(of_row));
#pragma GCC unroll 1
        for (int i = 0; i < Lanes::kWidth; ++i) {
          total[i] += of_row[i];
        }
        std::memcpy(to, total, sizeof(total));
      }
    }
  }
};
