// CPU kernels of the depth-wise convolution. Threads share the images in bands of rows. The gradient of the weight is
// summed band by band in a fixed order, so results do not depend on the number of threads.
#include "depthwise_conv.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace grootvl::cpu {

namespace {

// Rows first..last-1 of one image.
struct Band {
  int64_t index, image, first, last;
};

// Splits all images into bands, independently of the number of threads.
class Bands {
 public:
  // A band has at least `least` rows, unless the image has fewer.
  Bands(const at::Tensor& x, int64_t least)
      : height_(x.size(1)),
        rows_(std::min(height_, std::max(least, kValues / std::max<int64_t>(1, x.size(2) * x.size(3))))),
        each_(at::divup(height_, rows_)),
        count_(x.size(0) * each_) {}

  int64_t count() const {
    return count_;
  }

  template <typename Run>
  void for_each(const Run& run) const {
    at::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t first = band % each_ * rows_;
        run(Band{band, band / each_, first, std::min(first + rows_, height_)});
      }
    });
  }

 private:
  // Enough values to make a band worth the overhead of a task.
  static constexpr int64_t kValues = 16384;

  int64_t height_, rows_, each_, count_;
};

template <typename scalar_t>
class Images {
 public:
  explicit Images(const at::Tensor& tensor)
      : tensor_(tensor), data_(tensor.const_data_ptr<scalar_t>()), zeros_(tensor.size(3), scalar_t(0)) {}

  int64_t column_stride() const {
    return tensor_.stride(2);
  }

  // nullptr outside the image.
  const scalar_t* row(int64_t image, int64_t row) const {
    const bool inside = 0 <= row && row < tensor_.size(1);
    return inside ? data_ + image * tensor_.stride(0) + row * tensor_.stride(1) : nullptr;
  }

  // A row and its two neighbours.
  ConvolutionRows<scalar_t> rows(int64_t image, int64_t middle) const {
    return {
        {row(image, middle - 1), row(image, middle), row(image, middle + 1)},
        zeros_.data(),
        column_stride(),
        tensor_.size(2),
        tensor_.size(3)};
  }

 private:
  const at::Tensor& tensor_;
  const scalar_t* data_;
  std::vector<scalar_t> zeros_;
};

struct Cpu {
  using Scope = NoScope;

  static void forward(const at::Tensor& x, const at::Tensor& weight, at::Tensor& y) {
    const at::Tensor taps = weight.view({-1, kTaps}).t().contiguous();
    const int64_t height = x.size(1), values = x.size(2) * x.size(3);
    with_scalar(x.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = Accumulated<scalar_t>;
      const Images<scalar_t> images(x);
      scalar_t* const to = y.mutable_data_ptr<scalar_t>();
      Bands(x, 1).for_each([&](const Band& band) {
        with_kernels([&](auto kernels) {
          for (int64_t row = band.first; row < band.last; ++row) {
            kernels.convolve(
                images.rows(band.image, row), taps.const_data_ptr<acc_t>(), to + (band.image * height + row) * values);
          }
        });
      });
    });
  }

  static at::Tensor backward(
      const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, at::Tensor& grad_x) {
    // The gradients of the rows next to a band are computed twice, so bands must not be too small.
    constexpr int64_t kLeastRows = 16;
    const at::Tensor taps = weight.view({-1, kTaps}).t().contiguous(), reversed = taps.flip(0);
    const int64_t height = x.size(1), width = x.size(2), channels = x.size(3), values = width * channels;
    const Bands bands(x, kLeastRows);
    const at::Tensor sums = at::zeros({bands.count(), kTaps, channels}, weight.options());
    with_scalar(x.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = Accumulated<scalar_t>;
      const Images<scalar_t> images(x), of_y(grad_y);
      scalar_t* const to = grad_x.mutable_data_ptr<scalar_t>();
      bands.for_each([&](const Band& band) {
        // A ring buffer for the gradients of three rows, and one position of zeros.
        std::vector<acc_t> memory(3 * values + channels);
        const auto memory_of = [&](int64_t row) { return memory.data() + row % 3 * values; };
        const auto grad_of = [&](int64_t row) { return 0 <= row && row < height ? memory_of(row) : nullptr; };
        with_kernels([&](auto kernels) {
          const auto compute = [&](int64_t row) {
            if (row < 0 || row >= height) {
              return;
            }
            const ConvolutionRows<scalar_t> rows = images.rows(band.image, row);
            kernels.silu_backward(
                rows, taps.const_data_ptr<acc_t>(), of_y.row(band.image, row), of_y.column_stride(), memory_of(row));
            if (band.first <= row && row < band.last) {
              kernels.weight_backward(
                  rows, memory_of(row), sums.mutable_data_ptr<acc_t>() + band.index * kTaps * channels);
            }
          };
          compute(band.first - 1);
          compute(band.first);
          for (int64_t row = band.first; row < band.last; ++row) {
            compute(row + 1);
            const ConvolutionRows<acc_t> grads{
                {grad_of(row - 1), grad_of(row), grad_of(row + 1)},
                memory.data() + 3 * values,
                channels,
                width,
                channels};
            kernels.convolve_backward(
                grads, reversed.const_data_ptr<acc_t>(), to + (band.image * height + row) * values);
          }
        });
      });
    });
    return sums.sum(0);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("depthwise_conv_silu", &DepthwiseConvOperators<Cpu>::forward);
  m.impl("depthwise_conv_silu_backward", &DepthwiseConvOperators<Cpu>::backward);
}

}  // namespace grootvl::cpu
