// CUDA kernels of the depth-wise convolution. A thread processes one channel of four rows of an image, column by
// column, with a sliding window in registers: no shared memory, no barriers. The threads of a block have neighbouring
// channels of the same rows, so what depends on the position is the same in all of them, and channels need not come in
// packs. The rows above and below are read again, mostly from the caches. Each column is loaded one step before it is
// needed.
//
// The gradient of the weight is summed over the columns of a thread and then over the blocks, whose number depends on
// the shape only, so results are deterministic.
#include "depthwise_conv.h"

#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/sigmoid.cuh"

namespace grootvl::cuda {

namespace {

constexpr int kRows = 4;
constexpr int kMostThreads = 160;
// The blocks that a multiprocessor shall have registers for.
constexpr int kForwardBlocks = 6, kBackwardBlocks = 4;

// A batch of channels-last images (B, H, W, D).
template <typename scalar_t>
struct Images {
  const scalar_t* data;
  int64_t image_stride, column_stride;
  int row_stride;

  __device__ const scalar_t* at(int64_t image, int64_t row, int64_t column) const {
    return data + image * image_stride + row * row_stride + column * column_stride;
  }
};

// How blocks share the work. A strip is a segment of kRows rows. A block processes a strip at a time; blockIdx.y
// selects its channels, one a thread.
struct Work {
  int height, width, channels;
  int row_groups, segments, columns;
  int64_t strips;
};

// One strip.
struct Strip {
  int64_t image;
  int row, first, end;

  __device__ Strip(const Work& work, int64_t index) {
    const int64_t group = index / work.row_groups;
    row = static_cast<int>(index % work.row_groups) * kRows;
    image = group / work.segments;
    first = static_cast<int>(group % work.segments) * work.columns;
    end = min(first + work.columns, work.width);
  }

  // The index of its first vertex.
  __device__ int64_t position(const Work& work) const {
    return (image * work.height + row) * work.width + first;
  }
};

// The threads of a block agree on which rows of a column are inside the image: bit r for the r-th.
__device__ inline unsigned rows_inside(const Work& work, int row, int count) {
  unsigned inside = 0;
#pragma unroll
  for (int r = 0; r < count; ++r) {
    inside |= (0 <= row + r && row + r < work.height ? 1u : 0u) << r;
  }
  return inside;
}

// Loads the rows of a column that are inside the image, from `at` on, and 0 for the others.
template <int kCount, typename scalar_t>
__device__ void load_column(const scalar_t* at, int row_stride, unsigned inside, scalar_t (&values)[kCount]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    values[r] = scalar_t(0);
    if (inside & 1u << r) {
      values[r] = at[r * row_stride];
    }
  }
}

// Stores the rows of a column that are inside the image.
template <int kCount, typename scalar_t, typename acc_t>
__device__ void store_column(const acc_t (&values)[kCount], scalar_t* at, int row_stride, unsigned inside) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    if (inside & 1u << r) {
      at[r * row_stride] = static_cast<scalar_t>(values[r]);
    }
  }
}

template <typename acc_t, int kCount, typename scalar_t>
__device__ void widen(const scalar_t (&from)[kCount], acc_t (&to)[kCount]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    to[r] = static_cast<acc_t>(from[r]);
  }
}

// The taps of the thread's channel.
template <typename acc_t>
struct Taps {
  acc_t of[kTaps];

  __device__ explicit Taps(const acc_t* weight) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      of[tap] = weight[tap];
    }
  }
};

// Sums of kRows results of the previous, the current and the next column.
template <typename acc_t>
struct Sums {
  acc_t of[3][kRows] = {};

  __device__ void step() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      of[0][r] = of[1][r];
      of[1][r] = of[2][r];
      of[2][r] = 0;
    }
  }
};

// y = SiLU(convolution).
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kMostThreads, sizeof(acc_t) == 4 ? kForwardBlocks : 1)
    convolve_kernel(Work work, Images<scalar_t> x, const acc_t* __restrict__ weight, scalar_t* __restrict__ y) {
  constexpr int kOuter = kRows + 2;
  const int channel = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (channel >= work.channels) {
    return;
  }
  const Strip strip(work, blockIdx.x);
  const Taps<acc_t> taps(weight + static_cast<int64_t>(channel) * kTaps);
  const unsigned inside = rows_inside(work, strip.row - 1, kOuter);
  const scalar_t* from = x.at(strip.image, strip.row - 1, strip.first - 1) + channel;
  scalar_t* to = y + strip.position(work) * work.channels + channel;
  const int to_stride = work.width * work.channels;
  Sums<acc_t> sums;
  scalar_t next[kOuter];
  load_column(from, x.row_stride, strip.first > 0 ? inside : 0, next);
#pragma unroll 3
  for (int column = strip.first - 1; column <= strip.end; ++column) {
    acc_t current[kOuter];
    widen(next, current);
    if (column < strip.end) {
      from += x.column_stride;
      load_column(from, x.row_stride, column + 1 < work.width ? inside : 0, next);
    }
#pragma unroll
    for (int r = 0; r < kOuter; ++r) {
#pragma unroll
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        const int to_row = r - tap_row;
        if (0 <= to_row && to_row < kRows) {
#pragma unroll
          for (int side = 0; side < 3; ++side) {
            sums.of[side][to_row] += taps.of[3 * tap_row + 2 - side] * current[r];
          }
        }
      }
    }
    if (column > strip.first) {
      acc_t results[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        results[r] = sums.of[0][r] * sigmoid(sums.of[0][r]);
      }
      store_column(results, to, to_stride, inside >> 1);
      to += work.channels;
    }
    sums.step();
  }
}

// The backward pass; a block processes every gridDim.x-th strip from blockIdx.x on. Recomputes z and its gradient in
// the strip and a margin of 1 around it. Writes partial sums of the weight's gradient, (gridDim.x, 9, channels).
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kMostThreads, sizeof(acc_t) == 4 ? kBackwardBlocks : 1) convolve_backward_kernel(
    Work work,
    Images<scalar_t> x,
    Images<scalar_t> grad_y,
    const acc_t* __restrict__ weight,
    scalar_t* __restrict__ grad_x,
    acc_t* __restrict__ grad_weight) {
  // The rows of z that are needed, and the rows of x for these.
  constexpr int kInner = kRows + 2, kOuter = kRows + 4;
  const int channel = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (channel >= work.channels) {
    return;
  }
  const Taps<acc_t> taps(weight + static_cast<int64_t>(channel) * kTaps);
  const int to_stride = work.width * work.channels;
  acc_t of_taps[kTaps] = {};
  for (int64_t index = blockIdx.x; index < work.strips; index += gridDim.x) {
    const Strip strip(work, index);
    const unsigned inside = rows_inside(work, strip.row - 2, kOuter);
    const auto inside_at = [&](int column) { return 0 <= column && column < work.width ? inside : 0; };
    const scalar_t* from = x.at(strip.image, strip.row - 2, strip.first - 2) + channel;
    const scalar_t* grad_from = grad_y.at(strip.image, strip.row - 1, strip.first - 1) + channel;
    scalar_t* to = grad_x + strip.position(work) * work.channels + channel;
    // The previous, the current and the next column of x, and what has been loaded for the next step.
    acc_t window[3][kOuter];
    scalar_t next[kOuter], next_grad[kInner];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      load_column(from, x.row_stride, inside_at(strip.first - 2 + i), next);
      from += x.column_stride;
      if (i < 2) {
        widen(next, window[i + 1]);
      }
    }
    load_column(grad_from, grad_y.row_stride, inside_at(strip.first - 1) >> 1, next_grad);
    Sums<acc_t> sums;
#pragma unroll 3
    for (int column = strip.first - 1; column <= strip.end; ++column) {
#pragma unroll
      for (int r = 0; r < kOuter; ++r) {
        window[0][r] = window[1][r];
        window[1][r] = window[2][r];
      }
      widen(next, window[2]);
      acc_t grad[kInner];
      widen(next_grad, grad);
      if (column < strip.end) {
        load_column(from, x.row_stride, inside_at(column + 2), next);
        from += x.column_stride;
        grad_from += grad_y.column_stride;
        load_column(grad_from, grad_y.row_stride, inside_at(column + 1) >> 1, next_grad);
      }
      if (0 <= column && column < work.width) {
        const bool own_column = strip.first <= column && column < strip.end;
#pragma unroll
        for (int r = 0; r < kInner; ++r) {
          acc_t z = 0;
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) {
            z += taps.of[tap] * window[tap % 3][r + tap / 3];
          }
          // The gradient is 0 outside the image.
          const acc_t sigma = sigmoid(z);
          const acc_t of_z = grad[r] * sigma * (1 + z * (1 - sigma));
          if (1 <= r && r <= kRows) {
            const acc_t own = own_column ? of_z : 0;
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
              of_taps[tap] += own * window[tap % 3][r + tap / 3];
            }
          }
#pragma unroll
          for (int tap_row = 0; tap_row < 3; ++tap_row) {
            const int to_row = r + tap_row - 2;
            if (0 <= to_row && to_row < kRows) {
#pragma unroll
              for (int side = 0; side < 3; ++side) {
                sums.of[side][to_row] += taps.of[3 * tap_row + side] * of_z;
              }
            }
          }
        }
      }
      if (column > strip.first) {
        store_column(sums.of[0], to, to_stride, inside >> 2);
        to += work.channels;
      }
      sums.step();
    }
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    grad_weight[(static_cast<int64_t>(blockIdx.x) * kTaps + tap) * work.channels + channel] = of_taps[tap];
  }
}

// ---- on the host ----

// The distance of the rows of a column fits into an int.
constexpr int64_t kLargestStride = std::numeric_limits<int>::max() / (kRows + 4);

template <typename scalar_t>
Images<scalar_t> images_of(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.size(1) == 1 || tensor.stride(1) <= kLargestStride,
      "the rows of an image must be at most ",
      kLargestStride,
      " elements apart, got strides ",
      tensor.strides());
  return {
      tensor.const_data_ptr<scalar_t>(),
      tensor.stride(0),
      tensor.stride(2),
      tensor.size(1) == 1 ? 0 : static_cast<int>(tensor.stride(1))};
}

Work share_work(const at::Tensor& x) {
  // The threads that fill a large GPU. If there are fewer rows, they are split into segments, which overlap by a
  // column.
  constexpr int64_t kThreadsWanted = int64_t{1} << 17, kLeastColumns = 16;
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  TORCH_CHECK_VALUE(
      height <= std::numeric_limits<int>::max() / 2 && width <= std::numeric_limits<int>::max() / 2 &&
          channels <= std::numeric_limits<int>::max() / kTaps && width <= kLargestStride / channels,
      "x is too large in one of its axes, got ",
      x.sizes());
  const int64_t row_groups = divide_up<int64_t>(height, kRows);
  const int64_t wanted = divide_up(kThreadsWanted, batch * row_groups * channels);
  const int64_t columns = divide_up(width, std::min(wanted, divide_up(width, kLeastColumns)));
  const int64_t segments = divide_up(width, columns);
  return {
      static_cast<int>(height),
      static_cast<int>(width),
      static_cast<int>(channels),
      static_cast<int>(row_groups),
      static_cast<int>(segments),
      static_cast<int>(columns),
      batch * row_groups * segments};
}

// Groups of channels of nearly the same size, in whole warps.
struct ChannelGroups {
  int64_t count, threads;

  explicit ChannelGroups(const Work& work) {
    const int64_t least = divide_up(work.channels, kMostThreads);
    threads = divide_up(divide_up<int64_t>(work.channels, least), int64_t{kWarpSize}) * kWarpSize;
    count = divide_up<int64_t>(work.channels, threads);
  }
};

dim3 grid_of(int64_t blocks, const ChannelGroups& groups, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      blocks <= std::numeric_limits<int>::max() && groups.count <= 65535,
      "x has too many elements for one call, got ",
      x.sizes());
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups.count));
}

// The number of blocks of a group of channels in the backward pass: each thread gets so many positions that writing its
// sums costs little.
int64_t count_backward_blocks(const Work& work, const ChannelGroups& groups) {
  constexpr int64_t kLeastPositions = 96, kMostBlocks = 2048;
  const int64_t each = std::max(
      divide_up<int64_t>(kLeastPositions, kRows * work.columns),
      divide_up(work.strips, std::max<int64_t>(1, kMostBlocks / groups.count)));
  return divide_up(work.strips, each);
}

struct Cuda {
  using Scope = c10::cuda::CUDAGuard;

  static void forward(const at::Tensor& x, const at::Tensor& weight, at::Tensor& y) {
    const Work work = share_work(x);
    const ChannelGroups groups(work);
    with_scalar(x.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = Accumulated<scalar_t>;
      launch(
          convolve_kernel<scalar_t, acc_t>,
          grid_of(work.strips, groups, x),
          static_cast<int>(groups.threads),
          0,
          work,
          images_of<scalar_t>(x),
          weight.const_data_ptr<acc_t>(),
          y.mutable_data_ptr<scalar_t>());
    });
  }

  static at::Tensor backward(
      const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, at::Tensor& grad_x) {
    const Work work = share_work(x);
    const ChannelGroups groups(work);
    const int64_t blocks = count_backward_blocks(work, groups);
    at::Tensor sums = at::empty({blocks, kTaps, work.channels}, weight.options());
    with_scalar(x.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = Accumulated<scalar_t>;
      launch(
          convolve_backward_kernel<scalar_t, acc_t>,
          grid_of(blocks, groups, x),
          static_cast<int>(groups.threads),
          0,
          work,
          images_of<scalar_t>(x),
          images_of<scalar_t>(grad_y),
          weight.const_data_ptr<acc_t>(),
          grad_x.mutable_data_ptr<scalar_t>(),
          sums.mutable_data_ptr<acc_t>());
    });
    return sums.sum(0);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("depthwise_conv_silu", &DepthwiseConvOperators<Cuda>::forward);
  m.impl("depthwise_conv_silu_backward", &DepthwiseConvOperators<Cuda>::backward);
}

}  // namespace grootvl::cuda
