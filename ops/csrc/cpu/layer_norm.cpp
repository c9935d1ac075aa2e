// CPU kernels of the layer norm. Threads share the rows in pieces. Sums over rows are computed piece by piece and added
// in a fixed order, so results do not depend on the number of threads.
#include "layer_norm.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/kernels.h"

namespace grootvl::cpu {

namespace {

// Splits the rows of all samples into pieces, independently of the number of threads.
struct Pieces {
  explicit Pieces(const at::Tensor& x)
      : channels(x.size(-1)),
        rows(x.numel() / channels),
        rows_a_sample(std::max<int64_t>(1, rows / x.size(0))),
        size(std::max<int64_t>(1, kValues / channels)),
        count(at::divup(rows, size)) {}

  // Calls run(piece, first row, end row) in parallel.
  template <typename Run>
  void for_each(const Run& run) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        run(piece, piece * size, std::min((piece + 1) * size, rows));
      }
    });
  }

  // Enough values to make a piece worth the overhead of a task.
  static constexpr int64_t kValues = 16384;

  int64_t channels, rows, rows_a_sample, size, count;
};

template <typename acc_t>
const acc_t* optional_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<acc_t>() : nullptr;
}

struct Cpu {
  using Scope = NoScope;

  static void forward(const LayerNormInputs& in, at::Tensor& sum, at::Tensor& normed) {
    const Pieces pieces(in.x);
    const int64_t channels = pieces.channels;
    with_scalar(in.x.scalar_type(), [&](auto of_x) {
      using scalar_t = decltype(of_x);
      using acc_t = Accumulated<scalar_t>;
      const scalar_t* x = in.x.const_data_ptr<scalar_t>();
      const acc_t* factor = optional_data<acc_t>(in.factor);
      const acc_t *weight = in.weight.const_data_ptr<acc_t>(), *bias = in.bias.const_data_ptr<acc_t>();
      const acc_t eps = static_cast<acc_t>(in.eps);
      with_same_or_16_bit<scalar_t>(normed.scalar_type(), [&](auto of_normed) {
        auto* to = normed.mutable_data_ptr<decltype(of_normed)>();
        with_same_or_16_bit<scalar_t>(
            in.branch.defined() ? in.branch.scalar_type() : in.x.scalar_type(), [&](auto of_branch) {
              using branch_t = decltype(of_branch);
              const branch_t* branch = optional_data<branch_t>(in.branch);
              scalar_t* total = sum.defined() ? sum.mutable_data_ptr<scalar_t>() : nullptr;
              pieces.for_each([&](int64_t, int64_t first, int64_t last) {
                with_kernels([&](auto kernels) {
                  for (int64_t r = first; r < last; ++r) {
                    const int64_t at = r * channels;
                    if (branch != nullptr) {
                      const acc_t scale = factor == nullptr ? acc_t(1) : factor[r / pieces.rows_a_sample];
                      kernels.add(x + at, branch + at, scale, channels, total + at);
                    }
                    // Normalizes the rounded sum, which is what the backward pass reads.
                    kernels.norm((branch == nullptr ? x : total) + at, weight, bias, eps, channels, to + at);
                  }
                });
              });
            });
      });
    });
  }

  static at::Tensor backward(
      const at::Tensor& grad_sum,
      const at::Tensor& grad_normed,
      const LayerNormInputs& in,
      at::Tensor& grad_x,
      const at::Tensor& grad_branch) {
    const Pieces pieces(in.x);
    const int64_t channels = pieces.channels;
    const at::Tensor sums = at::zeros({pieces.count, 2, channels}, in.weight.options());
    with_scalar(in.x.scalar_type(), [&](auto of_x) {
      using scalar_t = decltype(of_x);
      using acc_t = Accumulated<scalar_t>;
      const scalar_t* value = in.x.const_data_ptr<scalar_t>();
      const scalar_t* of_sum = optional_data<scalar_t>(grad_sum);
      const acc_t *factor = optional_data<acc_t>(in.factor), *weight = in.weight.const_data_ptr<acc_t>();
      const acc_t eps = static_cast<acc_t>(in.eps);
      scalar_t* to = grad_x.mutable_data_ptr<scalar_t>();
      with_same_or_16_bit<scalar_t>(grad_normed.scalar_type(), [&](auto of_grad) {
        const auto* grad = grad_normed.const_data_ptr<decltype(of_grad)>();
        const at::ScalarType branch_dtype = grad_branch.defined() ? grad_branch.scalar_type() : in.x.scalar_type();
        with_same_or_16_bit<scalar_t>(branch_dtype, [&](auto of_branch) {
          using branch_t = decltype(of_branch);
          branch_t* to_branch = grad_branch.defined() ? grad_branch.mutable_data_ptr<branch_t>() : nullptr;
          pieces.for_each([&](int64_t piece, int64_t first, int64_t last) {
            acc_t* of_weight = sums.mutable_data_ptr<acc_t>() + piece * 2 * channels;
            with_kernels([&](auto kernels) {
              for (int64_t r = first; r < last; ++r) {
                const int64_t at = r * channels;
                kernels.norm_backward(
                    value + at,
                    kernels.template moments<acc_t>(value + at, channels, eps),
                    weight,
                    channels,
                    grad + at,
                    of_sum == nullptr ? nullptr : of_sum + at,
                    factor == nullptr ? acc_t(1) : factor[r / pieces.rows_a_sample],
                    to + at,
                    to_branch == nullptr ? nullptr : to_branch + at,
                    of_weight,
                    of_weight + channels);
              }
            });
          });
        });
      });
    });
    return sums.sum(0);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("layer_norm", &LayerNormOperators<Cpu>::forward);
  m.impl("residual_layer_norm", &LayerNormOperators<Cpu>::residual);
  m.impl("layer_norm_backward", &LayerNormOperators<Cpu>::backward);
}

}  // namespace grootvl::cpu
