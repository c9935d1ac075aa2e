// The depth-wise 3x3 convolution of rows of an image, whose positions have their channels side by side.

struct DepthwiseConvKernels : Elementary {
  // Neighbouring positions whose sums are made together.
  static constexpr int kPositions = 4;

  // Calls finish(column, channel, sums) with the sums over the taps of some channels, for the columns of the middle
  // row. weight is (9, channels).
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
      for (; c + kLanes <= in.channels; c += kLanes) {
        convolve_block<kLanes>(from, weight, in.channels, column, count, c, finish);
      }
      for (; c < in.channels; ++c) {
        convolve_block<1>(from, weight, in.channels, column, count, c, finish);
      }
    }
  }

  template <int kWidth, typename scalar_t, typename acc_t, typename Finish>
  static void convolve_block(
      const scalar_t* const (&from)[3][kPositions + 2],
      const acc_t* weight,
      int64_t channels,
      int64_t column,
      int count,
      int64_t channel,
      const Finish& finish) {
    acc_t sums[kPositions][kWidth] = {};
    for (int r = 0; r < 3; ++r) {
      const acc_t* const taps = weight + 3 * r * channels + channel;
#pragma GCC unroll 6
      for (int p = 0; p < kPositions + 2; ++p) {
        acc_t values[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          values[i] = Rounding::widen(from[r][p][channel + i]);
        }
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
          const int to = p - tap;
          if (0 <= to && to < kPositions) {
            for (int i = 0; i < kWidth; ++i) {
              sums[to][i] += taps[tap * channels + i] * values[i];
            }
          }
        }
      }
    }
    for (int p = 0; p < count; ++p) {
      finish(column + p, channel, sums[p]);
    }
  }

  // y = SiLU(convolution) of one row.
  template <typename scalar_t, typename acc_t>
  static void convolve(const ConvolutionRows<scalar_t>& in, const acc_t* weight, scalar_t* __restrict y) {
    convolve_row(in, weight, [&](int64_t column, int64_t channel, const auto& sums) {
      scalar_t* __restrict to = y + column * in.channels + channel;
      for (size_t i = 0; i < std::size(sums); ++i) {
        to[i] = Rounding::round<scalar_t>(sums[i] * sigmoid(sums[i]));
      }
    });
  }

  // The gradient of what SiLU gets, of one row, (width, channels), from that of y.
  template <typename scalar_t, typename acc_t>
  static void silu_backward(
      const ConvolutionRows<scalar_t>& in,
      const acc_t* weight,
      const scalar_t* grad_y,
      int64_t grad_stride,
      acc_t* __restrict grad) {
    convolve_row(in, weight, [&](int64_t column, int64_t channel, const auto& z) {
      const scalar_t* __restrict of_y = grad_y + column * grad_stride + channel;
      acc_t* __restrict to = grad + column * in.channels + channel;
      for (size_t i = 0; i < std::size(z); ++i) {
        const acc_t sig = sigmoid(z[i]);
        to[i] = Rounding::widen(of_y[i]) * sig * (1 + z[i] * (1 - sig));
      }
    });
  }

  // From that to the gradient of x, of one row: the convolution with the taps in reverse.
  template <typename scalar_t, typename acc_t>
  static void convolve_backward(const ConvolutionRows<acc_t>& grad, const acc_t* reversed, scalar_t* __restrict grad_x) {
    convolve_row(grad, reversed, [&](int64_t column, int64_t channel, const auto& sums) {
      scalar_t* __restrict to = grad_x + column * grad.channels + channel;
      for (size_t i = 0; i < std::size(sums); ++i) {
        to[i] = Rounding::round<scalar_t>(sums[i]);
      }
    });
  }

  // Adds the gradient of the weight, (9, channels), of one row.
  template <typename scalar_t, typename acc_t>
  static void weight_backward(
      const ConvolutionRows<scalar_t>& in, const acc_t* __restrict grad, acc_t* __restrict grad_weight) {
    int64_t c = 0;
    for (; c + kLanes <= in.channels; c += kLanes) {
      weight_backward_block<kLanes>(in, grad, c, grad_weight);
    }
    for (; c < in.channels; ++c) {
      weight_backward_block<1>(in, grad, c, grad_weight);
    }
  }

  template <int kWidth, typename scalar_t, typename acc_t>
  static void weight_backward_block(
      const ConvolutionRows<scalar_t>& in,
      const acc_t* __restrict grad,
      int64_t channel,
      acc_t* __restrict grad_weight) {
    for (int r = 0; r < 3; ++r) {
      if (in.row[r] == nullptr) {
        continue;
      }
      acc_t sums[3][kWidth] = {};
      const scalar_t* __restrict from = in.row[r] + channel;
      const acc_t* __restrict of_z = grad + channel;
      acc_t before[kWidth] = {}, at[kWidth], behind[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        at[i] = of_z[i];
      }
      // Position `column` of x goes with the gradients one to its right (tap 0), at it and one to its left (tap 2).
      for (int64_t column = 0; column < in.width; ++column) {
        const bool has_next = column + 1 < in.width;
        for (int i = 0; i < kWidth; ++i) {
          behind[i] = has_next ? of_z[(column + 1) * in.channels + i] : acc_t(0);
        }
        for (int i = 0; i < kWidth; ++i) {
          const acc_t value = Rounding::widen(from[column * in.stride + i]);
          sums[0][i] += value * behind[i];
          sums[1][i] += value * at[i];
          sums[2][i] += value * before[i];
          before[i] = at[i];
          at[i] = behind[i];
        }
      }
      for (int tap = 0; tap < 3; ++tap) {
        acc_t* __restrict to = grad_weight + (3 * r + tap) * in.channels + channel;
        for (int i = 0; i < kWidth; ++i) {
          to[i] += sums[tap][i];
        }
      }
    }
  }
};
