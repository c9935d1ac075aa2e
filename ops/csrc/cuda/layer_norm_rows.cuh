// Kernels of the layer norm. As few lanes of a warp as possible hold a row in registers, so that each value is read
// once and short rows keep all lanes busy. Gradients of parameters are summed over the rows of a lane and the lanes of
// a block.
#pragma once

#include <type_traits>

#include "cuda/collectives.cuh"
#include "cuda/packs.cuh"

namespace grootvl::cuda {

constexpr int kThreads = 256;
// The distribution of a row over the registers of `lanes` neighbouring lanes, a power of two: pack k of lane l begins
// at channel (k * lanes + l) * kPack.
template <int kPack_, int kPacks_>
struct Layout {
  static constexpr int kPack = kPack_, kPacks = kPacks_;

  int lanes, channels;

  // Calls visit(k, channel) for each pack of this lane.
  template <typename Visit>
  __device__ void for_each_pack(const Visit& visit) const {
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int channel = (k * lanes + lane) * kPack;
      if (channel < channels) {
        visit(k, channel);
      }
    }
  }

  // The sum over the lanes of a row, the same in each of them.
  template <typename acc_t>
  __device__ acc_t sum(acc_t value) const {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      if (offset < lanes) {
        value += __shfl_xor_sync(kAllLanes, value, offset);
      }
    }
    return value;
  }
};

// The packs of one lane.
template <typename Layout, typename acc_t>
struct Registers {
  acc_t of[Layout::kPacks][Layout::kPack];

  __device__ void clear() {
#pragma unroll
    for (int k = 0; k < Layout::kPacks; ++k) {
#pragma unroll
      for (int i = 0; i < Layout::kPack; ++i) {
        of[k][i] = 0;
      }
    }
  }

  template <typename scalar_t>
  __device__ void load(const Layout& layout, const scalar_t* row) {
    layout.for_each_pack([&](int k, int channel) {
      const Pack<scalar_t, Layout::kPack> pack = load_pack<Layout::kPack>(row + channel);
#pragma unroll
      for (int i = 0; i < Layout::kPack; ++i) {
        of[k][i] = static_cast<acc_t>(pack.value[i]);
      }
    });
  }

  // Subtracts the mean and divides by the standard deviation. Returns 1 / standard deviation.
  __device__ acc_t standardise(const Layout& layout, acc_t eps) {
    acc_t total = 0;
    for_each(layout, [&](acc_t& value) { total += value; });
    const acc_t mean = layout.sum(total) / layout.channels;
    acc_t squares = 0;
    for_each(layout, [&](acc_t& value) {
      value -= mean;
      squares += value * value;
    });
    const acc_t scale = 1 / sqrt(layout.sum(squares) / layout.channels + eps);
    for_each(layout, [&](acc_t& value) { value *= scale; });
    return scale;
  }

  template <typename Visit>
  __device__ void for_each(const Layout& layout, const Visit& visit) {
    layout.for_each_pack([&](int k, int) {
#pragma unroll
      for (int i = 0; i < Layout::kPack; ++i) {
        visit(of[k][i]);
      }
    });
  }
};

// One factor per sample of `rows` rows, or 1 for all.
template <typename acc_t>
struct Factor {
  const acc_t* of_sample;
  int64_t rows;

  __device__ acc_t operator[](int64_t row) const {
    return of_sample == nullptr ? acc_t(1) : of_sample[row / rows];
  }
};

// branch_t is void if there is no branch.
template <typename scalar_t, typename branch_t, typename acc_t>
struct Forward {
  const scalar_t* x;
  const branch_t* branch;
  Factor<acc_t> factor;
  const acc_t *weight, *bias;
  acc_t eps;
  int64_t rows;
  scalar_t* sum;
  AnyOutput normed;
};

template <typename Layout, typename scalar_t, typename branch_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) layer_norm_kernel(Layout layout, Forward<scalar_t, branch_t, acc_t> p) {
  constexpr int kPack = Layout::kPack;
  const int64_t own = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / layout.lanes;
  // Lanes after the last row stay active, since sums need all lanes of a warp.
  const bool inside = own < p.rows;
  const int64_t row = inside ? own : p.rows - 1, first = row * layout.channels;
  Registers<Layout, acc_t> values;
  values.load(layout, p.x + first);
  if constexpr (!std::is_void_v<branch_t>) {
    Registers<Layout, acc_t> added;
    added.load(layout, p.branch + first);
    const acc_t factor = p.factor[row];
    layout.for_each_pack([&](int k, int channel) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        // Normalizes the rounded sum, which is what the backward pass reads.
        values.of[k][i] = static_cast<acc_t>(static_cast<scalar_t>(values.of[k][i] + factor * added.of[k][i]));
      }
      if (inside) {
        store_pack(values.of[k], p.sum + first + channel);
      }
    });
  }
  values.standardise(layout, p.eps);
  layout.for_each_pack([&](int k, int channel) {
    const Pack<acc_t, kPack> weight = load_pack<kPack>(p.weight + channel), bias = load_pack<kPack>(p.bias + channel);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      values.of[k][i] = values.of[k][i] * weight.value[i] + bias.value[i];
    }
    if (inside) {
      p.normed.store(first + channel, values.of[k]);
    }
  });
}

template <typename scalar_t, typename grad_t, typename acc_t>
struct Backward {
  const scalar_t *grad_sum, *value;
  const grad_t* grad_normed;
  Factor<acc_t> factor;
  const acc_t* weight;
  acc_t eps;
  int64_t rows;
  scalar_t* grad_x;
  AnyOutput grad_branch;
  // The gradients of weight and bias, (blocks, 2, channels).
  acc_t* sums;
};

// Adds the sums over the rows of a block in shared memory, (2, channels), warp after warp, and stores them.
template <typename Layout, typename acc_t>
__device__ void store_sums_of_block(
    const Layout& layout, Registers<Layout, acc_t>& of_weight, Registers<Layout, acc_t>& of_bias, acc_t* sums) {
  acc_t* const of_block = shared_memory_as<acc_t>();
  Registers<Layout, acc_t>* const both[2] = {&of_weight, &of_bias};
#pragma unroll
  for (int array = 0; array < 2; ++array) {
#pragma unroll
    for (int k = 0; k < Layout::kPacks; ++k) {
#pragma unroll
      for (int i = 0; i < Layout::kPack; ++i) {
        acc_t& sum = both[array]->of[k][i];
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
          if (offset >= layout.lanes) {
            sum += __shfl_xor_sync(kAllLanes, sum, offset);
          }
        }
      }
    }
  }
  for (int warp = 0; warp < warps_in_block(); ++warp) {
    if (warp == warp_index() && lane_index() < layout.lanes) {
      layout.for_each_pack([&](int k, int channel) {
#pragma unroll
        for (int i = 0; i < Layout::kPack; ++i) {
          acc_t& weight = of_block[channel + i];
          acc_t& bias = of_block[layout.channels + channel + i];
          weight = (warp == 0 ? 0 : weight) + of_weight.of[k][i];
          bias = (warp == 0 ? 0 : bias) + of_bias.of[k][i];
        }
      });
    }
    __syncthreads();
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 2 * layout.channels;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * layout.channels; i += kThreads) {
    sums[first + i] = of_block[i];
  }
}

template <typename Layout, typename scalar_t, typename grad_t, typename acc_t>
__global__ void __launch_bounds__(kThreads)
    layer_norm_backward_kernel(Layout layout, Backward<scalar_t, grad_t, acc_t> p) {
  constexpr int kPack = Layout::kPack;
  const int rows_at_once = kThreads / layout.lanes;
  const int own = static_cast<int>(threadIdx.x) / layout.lanes;
  Registers<Layout, acc_t> of_weight, of_bias;
  of_weight.clear();
  of_bias.clear();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * rows_at_once;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * rows_at_once; begin < p.rows; begin += stride) {
    const bool inside = begin + own < p.rows;
    const int64_t row = inside ? begin + own : p.rows - 1, first = row * layout.channels;
    Registers<Layout, acc_t> normal, grad, of_sum;
    normal.load(layout, p.value + first);
    grad.load(layout, p.grad_normed + first);
    of_sum.clear();
    if (p.grad_sum != nullptr) {
      of_sum.load(layout, p.grad_sum + first);
    }
    const acc_t scale = normal.standardise(layout, p.eps);
    acc_t mean = 0, product = 0;
    layout.for_each_pack([&](int k, int channel) {
      const Pack<acc_t, kPack> weight = load_pack<kPack>(p.weight + channel);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const acc_t of_normed = grad.of[k][i];
        if (inside) {
          of_weight.of[k][i] += of_normed * normal.of[k][i];
          of_bias.of[k][i] += of_normed;
        }
        grad.of[k][i] = of_normed * weight.value[i];
        mean += grad.of[k][i];
        product += grad.of[k][i] * normal.of[k][i];
      }
    });
    mean = layout.sum(mean) / layout.channels;
    product = layout.sum(product) / layout.channels;
    const acc_t factor = p.grad_branch.data == nullptr ? acc_t(1) : p.factor[row];
    if (inside) {
      layout.for_each_pack([&](int k, int channel) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          grad.of[k][i] = scale * (grad.of[k][i] - mean - normal.of[k][i] * product) + of_sum.of[k][i];
        }
        store_pack(grad.of[k], p.grad_x + first + channel);
        if (p.grad_branch.data != nullptr) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            grad.of[k][i] *= factor;
          }
          p.grad_branch.store(first + channel, grad.of[k]);
        }
      });
    }
  }
  store_sums_of_block(layout, of_weight, of_bias, p.sums);
}

}  // namespace grootvl::cuda
