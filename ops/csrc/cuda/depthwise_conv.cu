// CUDA kernels of the depth-wise convolution. A thread processes a few neighbouring channels of two rows of an image,
// column by column, with a sliding window in registers: no shared memory, no barriers. The rows above and below are
// read again, mostly from the caches.
//
// The gradient of the weight is summed over the columns of a thread, the threads of a block and then the blocks, whose
// number depends on the shape only, so results are deterministic.
#include "depthwise_conv.h"

#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/collectives.cuh"
#include "cuda/packs.cuh"

namespace grootvl::cuda {

namespace {

constexpr int kRows = 2;
constexpr int kMostThreads = 256, kMostPacksInBlock = 128;

// A batch of channels-last images (B, H, W, D).
template <typename scalar_t>
struct Images {
  const scalar_t* data;
  int64_t image_stride, row_stride, column_stride;

  __device__ const scalar_t* image(int64_t index) const {
    return data + index * image_stride;
  }
};

// How threads share the work. A strip is a segment of kRows rows. A block processes `slots` strips and `packs` packs of
// neighbouring channels at a time; blockIdx.y selects the packs.
struct Work {
  int height, width, channels;
  int packs, slots;
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
};

template <typename acc_t>
__device__ acc_t sigmoid(acc_t x) {
  return 1 / (1 + exp(-x));
}

// kCount rows of a column in the storage dtype; 0 outside the image.
template <int kCount, int kPack, typename scalar_t>
struct Column {
  Pack<scalar_t, kPack> of[kCount];

  // `channel` points to the channels of this image; `row` may be outside it.
  __device__ void load(const Work& work, const Images<scalar_t>& images, const scalar_t* channel, int row, int column) {
    const bool inside = 0 <= column && column < work.width;
    const scalar_t* const at = channel + column * images.column_stride;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      if (inside && 0 <= row + r && row + r < work.height) {
        of[r] = load_pack<kPack>(at + (row + r) * images.row_stride);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          of[r].value[i] = scalar_t(0);
        }
      }
    }
  }
};

// The taps of the thread's channels.
template <int kPack, typename acc_t>
struct Taps {
  acc_t of[kTaps][kPack];

  __device__ explicit Taps(const acc_t* weight) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        of[tap][i] = weight[i * kTaps + tap];
      }
    }
  }
};

// y = SiLU(convolution).
template <int kPack, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kMostThreads)
    convolve_kernel(Work work, Images<scalar_t> x, const acc_t* __restrict__ weight, scalar_t* __restrict__ y) {
  const int slot = static_cast<int>(threadIdx.x) / work.packs;
  const int channel = (blockIdx.y * work.packs + threadIdx.x % work.packs) * kPack;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * work.slots + slot;
  if (index >= work.strips || channel >= work.channels) {
    return;
  }
  const Strip strip(work, index);
  const Taps<kPack, acc_t> taps(weight + static_cast<int64_t>(channel) * kTaps);
  const scalar_t* const from = x.image(strip.image) + channel;
  const auto load = [&](int column) {
    Column<kRows + 2, kPack, scalar_t> loaded;
    loaded.load(work, x, from, strip.row - 1, column);
    return loaded;
  };
  // Sums of the previous, the current and the next column.
  acc_t sums[3][kRows][kPack] = {};
  auto next = load(strip.first - 1);
  for (int column = strip.first - 1; column <= strip.end; ++column) {
    const auto current = next;
    if (column < strip.end) {
      next = load(column + 1);
    }
#pragma unroll
    for (int r = 0; r < kRows + 2; ++r) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const acc_t value = static_cast<acc_t>(current.of[r].value[i]);
#pragma unroll
        for (int tap_row = 0; tap_row < 3; ++tap_row) {
          const int to = r - tap_row;
          if (0 <= to && to < kRows) {
#pragma unroll
            for (int side = 0; side < 3; ++side) {
              sums[side][to][i] += taps.of[3 * tap_row + 2 - side][i] * value;
            }
          }
        }
      }
    }
    if (column > strip.first) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (strip.row + r < work.height) {
          acc_t results[kPack];
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            results[i] = sums[0][r][i] * sigmoid(sums[0][r][i]);
          }
          const int64_t position = (strip.image * work.height + strip.row + r) * work.width + column - 1;
          store_pack(results, y + position * work.channels + channel);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        sums[0][r][i] = sums[1][r][i];
        sums[1][r][i] = sums[2][r][i];
        sums[2][r][i] = 0;
      }
    }
  }
}

// The backward pass; each slot processes every gridDim.x-th strip from blockIdx.x on. Recomputes z and its gradient in
// the strip and a margin of 1 around it. Writes partial sums of the weight's gradient, (gridDim.x, 9, channels).
template <int kPack, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kMostThreads, sizeof(acc_t) == 4 ? 2 : 1) convolve_backward_kernel(
    Work work,
    Images<scalar_t> x,
    Images<scalar_t> grad_y,
    const acc_t* __restrict__ weight,
    scalar_t* __restrict__ grad_x,
    acc_t* __restrict__ grad_weight) {
  // The rows of z that are needed, and the rows of x for these.
  constexpr int kInner = kRows + 2, kOuter = kRows + 4;
  const int slot = static_cast<int>(threadIdx.x) / work.packs;
  const int pack = static_cast<int>(threadIdx.x) % work.packs;
  const int channel = (blockIdx.y * work.packs + pack) * kPack;
  const bool has_channel = channel < work.channels;
  acc_t of_taps[kTaps][kPack] = {};
  if (has_channel) {
    const Taps<kPack, acc_t> taps(weight + static_cast<int64_t>(channel) * kTaps);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * work.slots;
    for (int64_t index = static_cast<int64_t>(blockIdx.x) * work.slots + slot; index < work.strips; index += stride) {
      const Strip strip(work, index);
      const scalar_t* const from = x.image(strip.image) + channel;
      const scalar_t* const grad_from = grad_y.image(strip.image) + channel;
      // Three columns of x, and the sums of the previous, the current and the next column of results.
      acc_t window[3][kOuter][kPack] = {}, sums[3][kRows][kPack] = {};
      Column<kOuter, kPack, scalar_t> next;
      next.load(work, x, from, strip.row - 2, strip.first - 2);
      for (int column = strip.first - 3; column <= strip.end; ++column) {
        // x is loaded one column ahead of z.
        Column<kInner, kPack, scalar_t> grad;
        grad.load(work, grad_y, grad_from, strip.row - 1, column);
#pragma unroll
        for (int r = 0; r < kOuter; ++r) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            window[0][r][i] = window[1][r][i];
            window[1][r][i] = window[2][r][i];
            window[2][r][i] = static_cast<acc_t>(next.of[r].value[i]);
          }
        }
        if (column < strip.end) {
          next.load(work, x, from, strip.row - 2, column + 2);
        }
        if (column < strip.first - 1) {
          continue;
        }
        const bool own_column = strip.first <= column && column < strip.end;
#pragma unroll
        for (int r = 0; r < kInner; ++r) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            acc_t z = 0;
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
              z += taps.of[tap][i] * window[tap % 3][r + tap / 3][i];
            }
            // The gradient is 0 outside the image.
            const acc_t sigma = sigmoid(z);
            const acc_t of_z = static_cast<acc_t>(grad.of[r].value[i]) * sigma * (1 + z * (1 - sigma));
            if (1 <= r && r <= kRows && own_column) {
#pragma unroll
              for (int tap = 0; tap < kTaps; ++tap) {
                of_taps[tap][i] += of_z * window[tap % 3][r + tap / 3][i];
              }
            }
#pragma unroll
            for (int tap_row = 0; tap_row < 3; ++tap_row) {
              const int to = r + tap_row - 2;
              if (0 <= to && to < kRows) {
#pragma unroll
                for (int side = 0; side < 3; ++side) {
                  sums[side][to][i] += taps.of[3 * tap_row + side][i] * of_z;
                }
              }
            }
          }
        }
        if (column > strip.first) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (strip.row + r < work.height) {
              const int64_t position = (strip.image * work.height + strip.row + r) * work.width + column - 1;
              store_pack(sums[0][r], grad_x + position * work.channels + channel);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            sums[0][r][i] = sums[1][r][i];
            sums[1][r][i] = sums[2][r][i];
            sums[2][r][i] = 0;
          }
        }
      }
    }
  }
  // (9, packs, kPack), slot after slot.
  acc_t* const of_block = shared_memory_as<acc_t>();
  for (int turn = 0; turn < work.slots; ++turn) {
    if (turn == slot) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          acc_t& sum = of_block[(tap * work.packs + pack) * kPack + i];
          sum = (turn == 0 ? 0 : sum) + of_taps[tap][i];
        }
      }
    }
    __syncthreads();
  }
  if (slot == 0 && has_channel) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int64_t row = static_cast<int64_t>(blockIdx.x) * kTaps + tap;
      acc_t sums[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        sums[i] = of_block[(tap * work.packs + pack) * kPack + i];
      }
      store_pack(sums, grad_weight + row * work.channels + channel);
    }
  }
}

// ---- on the host ----

template <typename scalar_t>
Images<scalar_t> images_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<scalar_t>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Work share_work(const at::Tensor& x, int pack) {
  // The threads that fill a large GPU. If there are fewer rows, they are split into segments, which overlap by a
  // column.
  constexpr int64_t kThreadsWanted = int64_t{1} << 17, kLeastColumns = 16;
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  TORCH_CHECK_VALUE(
      height <= std::numeric_limits<int>::max() / 2 && width <= std::numeric_limits<int>::max() / 2 &&
          channels <= std::numeric_limits<int>::max() / kTaps,
      "x is too large in one of its axes, got ",
      x.sizes());
  const int64_t all_packs = divide_up<int64_t>(channels, pack);
  const int64_t groups = divide_up<int64_t>(all_packs, kMostPacksInBlock);
  const int64_t packs = divide_up(all_packs, groups);
  const int64_t row_groups = divide_up<int64_t>(height, kRows);
  const int64_t wanted = divide_up(kThreadsWanted, batch * row_groups * all_packs);
  const int64_t columns = divide_up(width, std::min(wanted, divide_up(width, kLeastColumns)));
  const int64_t segments = divide_up(width, columns);
  return {
      static_cast<int>(height),
      static_cast<int>(width),
      static_cast<int>(channels),
      static_cast<int>(packs),
      static_cast<int>(kMostThreads / packs),
      static_cast<int>(row_groups),
      static_cast<int>(segments),
      static_cast<int>(columns),
      batch * row_groups * segments};
}

unsigned count_channel_groups(const Work& work, int pack) {
  return static_cast<unsigned>(divide_up(divide_up(work.channels, pack), work.packs));
}

// The number of blocks of the backward kernel: each slot gets so many columns that writing its sums costs little.
int64_t count_backward_blocks(const Work& work, int64_t groups) {
  constexpr int64_t kLeastPositions = 128, kMostBlocks = 2048;
  const int64_t turns = divide_up<int64_t>(work.strips, work.slots);
  const int64_t each = std::max(
      divide_up<int64_t>(kLeastPositions, kRows * work.columns),
      divide_up(turns, std::max<int64_t>(1, kMostBlocks / groups)));
  return divide_up(turns, each);
}

template <typename scalar_t>
bool are_packed(const at::Tensor& images, int width) {
  const scalar_t* data = images.const_data_ptr<scalar_t>();
  return images.size(3) % width == 0 && is_packed(data, images.stride(0), width) &&
         is_packed(data, images.stride(1), width) && is_packed(data, images.stride(2), width);
}

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

struct Cuda {
  using Scope = c10::cuda::CUDAGuard;

  static void forward(const at::Tensor& x, const at::Tensor& weight, at::Tensor& y) {
    with_scalar(x.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = Accumulated<scalar_t>;
      const auto run = [&](auto width) {
        constexpr int kPack = decltype(width)::value;
        const Work work = share_work(x, kPack);
        const int64_t blocks = divide_up<int64_t>(work.strips, work.slots);
        const unsigned groups = count_channel_groups(work, kPack);
        TORCH_CHECK_VALUE(
            blocks <= std::numeric_limits<int>::max() && groups <= 65535,
            "x has too many elements for one call, got ",
            x.sizes());
        launch(
            convolve_kernel<kPack, scalar_t, acc_t>,
            dim3(static_cast<unsigned>(blocks), groups),
            work.packs * work.slots,
            0,
            work,
            images_of<scalar_t>(x),
            weight.const_data_ptr<acc_t>(),
            y.mutable_data_ptr<scalar_t>());
      };
      constexpr int kWidest = sizeof(scalar_t) == 8 ? 1 : 4;
      are_packed<scalar_t>(x, kWidest) ? run(Width<kWidest>()) : run(Width<1>());
    });
  }

  static at::Tensor backward(
      const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, at::Tensor& grad_x) {
    at::Tensor sums;
    with_scalar(x.scalar_type(), [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = Accumulated<scalar_t>;
      const auto run = [&](auto width) {
        constexpr int kPack = decltype(width)::value;
        const Work work = share_work(x, kPack);
        const unsigned groups = count_channel_groups(work, kPack);
        const int64_t blocks = count_backward_blocks(work, groups);
        TORCH_CHECK_VALUE(groups <= 65535, "x has too many channels for one call, got ", x.sizes());
        sums = at::empty({blocks, kTaps, work.channels}, weight.options());
        launch(
            convolve_backward_kernel<kPack, scalar_t, acc_t>,
            dim3(static_cast<unsigned>(blocks), groups),
            work.packs * work.slots,
            static_cast<int64_t>(kTaps) * work.packs * kPack * static_cast<int64_t>(sizeof(acc_t)),
            work,
            images_of<scalar_t>(x),
            images_of<scalar_t>(grad_y),
            weight.const_data_ptr<acc_t>(),
            grad_x.mutable_data_ptr<scalar_t>(),
            sums.mutable_data_ptr<acc_t>());
      };
      constexpr int kWidest = sizeof(scalar_t) == 8 ? 1 : 2;
      are_packed<scalar_t>(x, kWidest) && are_packed<scalar_t>(grad_y, kWidest) ? run(Width<kWidest>())
                                                                                : run(Width<1>());
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
