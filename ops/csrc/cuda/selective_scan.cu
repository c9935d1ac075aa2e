// CUDA kernels of the selective scan. The scan computes decays and inputs from the step sizes while it loads them; what
// follows it (two layer norms, skip connection, gate) is one kernel, a warp for each row of channels.
//
// Gradients of parameters are summed up by each warp over its rows, which depend on the number of rows only, and then
// over the warps, so they do not change from run to run.
#include "selective_scan.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "cuda/collectives.cuh"
#include "cuda/piece_scan.cuh"

namespace grootvl::cuda {

namespace {

template <typename acc_t>
__device__ acc_t softplus(acc_t x) {
  // As in PyTorch, the identity from 20 on.
  return x > 20 ? x : log1p(exp(x));
}

template <typename acc_t>
__device__ acc_t sigmoid(acc_t x) {
  return 1 / (1 + exp(-x));
}

// The streams of the scan: delta b x, and the gradient of h. `step` is delta before the softplus, rate -exp(A_log).
template <typename acc_t>
struct SelectiveInput {
  const acc_t *step, *rate, *x, *b, *grad_h;
  int64_t channels;

  __device__ acc_t decay(int64_t row, int64_t channel) const {
    return exp(rate[channel] * softplus(step[row * channels + channel]));
  }
  __device__ acc_t value(int stream, int64_t row, int64_t channel) const {
    const int64_t at = row * channels + channel;
    return stream == 0 ? softplus(step[at]) * b[row] * x[at] : grad_h[at];
  }
};

// Inputs and parameters that the kernels over rows read.
template <typename acc_t>
struct RowInputs {
  const acc_t *x, *step, *b, *c, *gate, *h;
  const acc_t *rate, *skip, *h_norm_weight, *h_norm_bias, *out_norm_weight, *out_norm_bias;
  int64_t rows, channels;
  acc_t eps;
};

// Calls `visit` with every channel of this lane.
template <typename Visit>
__device__ void for_each_channel(int64_t channels, const Visit& visit) {
  for (int64_t d = lane_index(); d < channels; d += kWarpSize) {
    visit(d);
  }
}

// Takes the mean off a row that lies in `values` and divides it by its standard deviation. Returns 1 / the latter.
template <typename acc_t>
__device__ acc_t standardise(acc_t* values, int64_t channels, acc_t eps) {
  acc_t sum = 0;
  for_each_channel(channels, [&](int64_t d) { sum += values[d]; });
  const acc_t mean = warp_sum(sum) / channels;
  acc_t squares = 0;
  for_each_channel(channels, [&](int64_t d) {
    values[d] -= mean;
    squares += values[d] * values[d];
  });
  const acc_t scale = 1 / sqrt(warp_sum(squares) / channels + eps);
  for_each_channel(channels, [&](int64_t d) { values[d] *= scale; });
  return scale;
}

// The gradient before standardise, of one channel: from that behind it, and the means of it and of it times the row.
template <typename acc_t>
__device__ acc_t standardise_backward(acc_t grad, acc_t standard, acc_t mean, acc_t mean_product, acc_t scale) {
  return scale * (grad - mean - standard * mean_product);
}

constexpr int kMostRowWarps = 8;

// y = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate), a warp a row; shared memory for one row a warp.
template <typename acc_t>
__global__ void output_kernel(RowInputs<acc_t> in, acc_t* __restrict__ y) {
  acc_t* const values = shared_memory_as<acc_t>() + warp_index() * in.channels;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); row < in.rows; row += stride) {
    const int64_t first = row * in.channels;
    for_each_channel(in.channels, [&](int64_t d) { values[d] = in.h[first + d]; });
    standardise(values, in.channels, in.eps);
    for_each_channel(in.channels, [&](int64_t d) {
      const acc_t h = values[d] * in.h_norm_weight[d] + in.h_norm_bias[d];
      values[d] = h * in.c[row] + in.skip[d] * in.x[first + d];
    });
    standardise(values, in.channels, in.eps);
    for_each_channel(in.channels, [&](int64_t d) {
      const acc_t gate = in.gate[first + d];
      y[first + d] = (values[d] * in.out_norm_weight[d] + in.out_norm_bias[d]) * gate * sigmoid(gate);
    });
  }
}

// Sums over the rows of a warp, in shared memory first: of `kArrays` rows of channels.
template <int kArrays, typename acc_t>
struct ParameterSums {
  acc_t* values;
  int64_t channels;

  __device__ void clear() const {
    for_each_channel(channels, [&](int64_t d) {
#pragma unroll
      for (int i = 0; i < kArrays; ++i) {
        values[i * channels + d] = 0;
      }
    });
  }
  __device__ void add(int array, int64_t d, acc_t value) const {
    values[array * channels + d] += value;
  }
  // To the part of this warp in `sums`, (warps, kArrays, channels).
  __device__ void store(acc_t* sums) const {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index();
    for_each_channel(channels, [&](int64_t d) {
#pragma unroll
      for (int i = 0; i < kArrays; ++i) {
        sums[(warp * kArrays + i) * channels + d] = values[i * channels + d];
      }
    });
  }
};

template <typename acc_t>
struct OutputGradients {
  acc_t *gate, *mixed, *h, *c;
  // (warps, kOutputSums, channels).
  acc_t* sums;
};

enum OutputSum : int { kSkip, kHNormWeight, kHNormBias, kOutNormWeight, kOutNormBias, kOutputSums };
// Rows that a warp keeps in shared memory beside its sums.
constexpr int kOutputRows = 3;

// Backward of output_kernel; `mixed` is what its second layer norm gets.
template <typename acc_t>
__global__ void output_backward_kernel(
    RowInputs<acc_t> in, const acc_t* __restrict__ grad_y, OutputGradients<acc_t> grads) {
  acc_t* const memory = shared_memory_as<acc_t>() + warp_index() * (kOutputRows + kOutputSums) * in.channels;
  acc_t *const h = memory, *const mixed = memory + in.channels, *const grad = memory + 2 * in.channels;
  const ParameterSums<kOutputSums, acc_t> sums{memory + kOutputRows * in.channels, in.channels};
  sums.clear();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); row < in.rows; row += stride) {
    const int64_t first = row * in.channels;
    const acc_t c = in.c[row];
    const auto normed_h = [&](int64_t d) { return h[d] * in.h_norm_weight[d] + in.h_norm_bias[d]; };
    for_each_channel(in.channels, [&](int64_t d) { h[d] = in.h[first + d]; });
    const acc_t h_scale = standardise(h, in.channels, in.eps);
    for_each_channel(in.channels, [&](int64_t d) { mixed[d] = normed_h(d) * c + in.skip[d] * in.x[first + d]; });
    const acc_t mixed_scale = standardise(mixed, in.channels, in.eps);

    acc_t mean = 0, mean_product = 0;
    for_each_channel(in.channels, [&](int64_t d) {
      const acc_t gate = in.gate[first + d], sigma = sigmoid(gate), of_y = grad_y[first + d];
      const acc_t normed = mixed[d] * in.out_norm_weight[d] + in.out_norm_bias[d];
      grads.gate[first + d] = of_y * normed * sigma * (1 + gate * (1 - sigma));
      const acc_t of_normed = of_y * gate * sigma;
      sums.add(kOutNormWeight, d, of_normed * mixed[d]);
      sums.add(kOutNormBias, d, of_normed);
      grad[d] = of_normed * in.out_norm_weight[d];
      mean += grad[d];
      mean_product += grad[d] * mixed[d];
    });
    mean = warp_sum(mean) / in.channels;
    mean_product = warp_sum(mean_product) / in.channels;

    acc_t grad_c = 0, h_mean = 0, h_mean_product = 0;
    for_each_channel(in.channels, [&](int64_t d) {
      const acc_t of_mixed = standardise_backward(grad[d], mixed[d], mean, mean_product, mixed_scale);
      grads.mixed[first + d] = of_mixed;
      sums.add(kSkip, d, of_mixed * in.x[first + d]);
      grad_c += of_mixed * normed_h(d);
      const acc_t of_normed = of_mixed * c;
      sums.add(kHNormWeight, d, of_normed * h[d]);
      sums.add(kHNormBias, d, of_normed);
      grad[d] = of_normed * in.h_norm_weight[d];
      h_mean += grad[d];
      h_mean_product += grad[d] * h[d];
    });
    grad_c = warp_sum(grad_c);
    if (lane_index() == 0) {
      grads.c[row] = grad_c;
    }
    h_mean = warp_sum(h_mean) / in.channels;
    h_mean_product = warp_sum(h_mean_product) / in.channels;
    for_each_channel(in.channels, [&](int64_t d) {
      grads.h[first + d] = standardise_backward(grad[d], h[d], h_mean, h_mean_product, h_scale);
    });
  }
  sums.store(grads.sums);
}

template <typename acc_t>
struct InputGradients {
  // x comes in as the gradient through the skip connection and goes out whole; step is the gradient before softplus.
  acc_t *x, *b, *step;
  // (warps, kInputSums, channels).
  acc_t* sums;
};

enum InputSum : int { kBias, kRate, kInputSums };

// From the gradients of the scan's values and decays to those of x, b, the step, its bias and the rate.
template <typename acc_t>
__global__ void input_backward_kernel(
    RowInputs<acc_t> in,
    const acc_t* __restrict__ grad_mixed,
    const acc_t* __restrict__ grad_value,
    const acc_t* __restrict__ grad_decay,
    InputGradients<acc_t> grads) {
  const ParameterSums<kInputSums, acc_t> sums{
      shared_memory_as<acc_t>() + warp_index() * kInputSums * in.channels, in.channels};
  sums.clear();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); row < in.rows; row += stride) {
    const int64_t first = row * in.channels;
    const acc_t b = in.b[row];
    acc_t grad_b = 0;
    for_each_channel(in.channels, [&](int64_t d) {
      const acc_t step = in.step[first + d], x = in.x[first + d], of_value = grad_value[first + d];
      const acc_t delta = softplus(step);
      // The gradient of the exponent of the decay, rate * delta.
      const acc_t of_exponent = grad_decay[first + d] * exp(in.rate[d] * delta);
      grads.x[first + d] = grad_mixed[first + d] * in.skip[d] + of_value * delta * b;
      grad_b += of_value * delta * x;
      const acc_t of_step = (of_value * b * x + of_exponent * in.rate[d]) * sigmoid(step);
      grads.step[first + d] = of_step;
      sums.add(kBias, d, of_step);
      sums.add(kRate, d, of_exponent * delta);
    });
    grad_b = warp_sum(grad_b);
    if (lane_index() == 0) {
      grads.b[row] = grad_b;
    }
  }
  sums.store(grads.sums);
}

// ---- on the host ----

// How warps share rows: enough to fill a large GPU, few enough that their sums stay small. Only the number of blocks'
// warps may depend on the device, so the number of warps is what is fixed.
int64_t count_row_warps(int64_t rows) {
  return std::min<int64_t>(4096, divide_up<int64_t>(divide_up<int64_t>(rows, 32), kMostRowWarps) * kMostRowWarps);
}

// Warps in a block: a divisor of kMostRowWarps.
int row_warps_in_block(int64_t bytes_a_warp) {
  int warps = warps_that_fit(bytes_a_warp, kMostRowWarps);
  while (kMostRowWarps % warps != 0) {
    --warps;
  }
  return warps;
}

// Launches a kernel over rows with `arrays` rows of shared memory a warp.
template <typename acc_t, typename... Parameters, typename... Arguments>
void launch_over_rows(
    void (*kernel)(Parameters...), int64_t rows, int64_t channels, int64_t arrays, Arguments&&... arguments) {
  const int64_t bytes_a_warp = arrays * channels * static_cast<int64_t>(sizeof(acc_t));
  const int warps = row_warps_in_block(bytes_a_warp);
  launch(
      kernel,
      dim3(static_cast<unsigned>(count_row_warps(rows) / warps)),
      warps * kWarpSize,
      warps * bytes_a_warp,
      std::forward<Arguments>(arguments)...);
}

// The inputs, contiguous, and what both directions compute first. All in one dtype, float32 or float64.
struct Prepared {
  SelectiveScanInputs in;
  at::Tensor step, rate;
  PieceTensors cut;
  Propagation propagation;
  double eps;

  template <typename acc_t>
  SelectiveInput<acc_t> scan_input(const at::Tensor* grad_h) const {
    return {
        step.const_data_ptr<acc_t>(),
        rate.const_data_ptr<acc_t>(),
        in.x.const_data_ptr<acc_t>(),
        in.b.const_data_ptr<acc_t>(),
        grad_h == nullptr ? nullptr : grad_h->const_data_ptr<acc_t>(),
        in.x.size(2)};
  }

  template <typename acc_t>
  at::Tensor scan() const {
    at::Tensor h = at::empty(in.x.sizes(), in.x.options());
    scan_forward<acc_t>(scan_input<acc_t>(nullptr), propagation, cut.pieces, h);
    return h;
  }

  template <typename acc_t>
  RowInputs<acc_t> row_inputs(const at::Tensor& h) const {
    return {
        in.x.const_data_ptr<acc_t>(),
        step.const_data_ptr<acc_t>(),
        in.b.const_data_ptr<acc_t>(),
        in.c.const_data_ptr<acc_t>(),
        in.gate.const_data_ptr<acc_t>(),
        h.const_data_ptr<acc_t>(),
        rate.const_data_ptr<acc_t>(),
        in.Ds.const_data_ptr<acc_t>(),
        in.h_norm_weight.const_data_ptr<acc_t>(),
        in.h_norm_bias.const_data_ptr<acc_t>(),
        in.out_norm_weight.const_data_ptr<acc_t>(),
        in.out_norm_bias.const_data_ptr<acc_t>(),
        in.x.size(0) * in.x.size(1),
        in.x.size(2),
        static_cast<acc_t>(eps)};
  }
};

Prepared prepare(
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    double eps,
    Propagation propagation) {
  const SelectiveScanInputs in = inputs.map([](const at::Tensor& tensor) { return tensor.contiguous(); });
  return {
      in,
      at::linear(in.dt, in.dt_weight, in.dt_bias),
      in.A_log.exp().neg(),
      cut_trees(parent.contiguous(), order.contiguous()),
      propagation,
      eps};
}

at::Tensor selective_scan_forward(
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    double eps,
    Propagation propagation) {
  at::Tensor y = at::empty(inputs.x.sizes(), inputs.x.options());
  if (y.numel() == 0) {
    return y;
  }
  const Prepared prepared = prepare(inputs, parent, order, eps, propagation);
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "tree_selective_scan", [&] {
    const at::Tensor h = prepared.scan<scalar_t>();
    const RowInputs<scalar_t> rows = prepared.row_inputs<scalar_t>(h);
    launch_over_rows<scalar_t>(
        output_kernel<scalar_t>, rows.rows, rows.channels, 1, rows, y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

SelectiveScanInputs selective_scan_backward(
    const at::Tensor& grad_y,
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    double eps,
    Propagation propagation) {
  SelectiveScanInputs grads =
      inputs.map([](const at::Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); });
  if (inputs.x.numel() == 0) {
    return grads.map([](const at::Tensor& grad) { return grad.zero_(); });
  }
  const Prepared prepared = prepare(inputs, parent, order, eps, propagation);
  const at::Tensor grad_rows = grad_y.contiguous();
  const auto options = inputs.x.options();
  AT_DISPATCH_FLOATING_TYPES(inputs.x.scalar_type(), "tree_selective_scan_backward", [&] {
    at::Tensor h = prepared.scan<scalar_t>();
    const RowInputs<scalar_t> rows = prepared.row_inputs<scalar_t>(h);
    const int64_t warps = count_row_warps(rows.rows), channels = rows.channels;

    at::Tensor grad_mixed = at::empty_like(prepared.step), grad_h = at::empty_like(prepared.step);
    at::Tensor output_sums = at::empty({warps, kOutputSums, channels}, options);
    launch_over_rows<scalar_t>(
        output_backward_kernel<scalar_t>,
        rows.rows,
        channels,
        kOutputRows + kOutputSums,
        rows,
        grad_rows.const_data_ptr<scalar_t>(),
        OutputGradients<scalar_t>{
            grads.gate.mutable_data_ptr<scalar_t>(),
            grad_mixed.mutable_data_ptr<scalar_t>(),
            grad_h.mutable_data_ptr<scalar_t>(),
            grads.c.mutable_data_ptr<scalar_t>(),
            output_sums.mutable_data_ptr<scalar_t>()});

    // h is not needed any more.
    at::Tensor grad_value = h, grad_decay = at::empty_like(prepared.step);
    scan_backward<scalar_t>(
        prepared.scan_input<scalar_t>(&grad_h), propagation, prepared.cut.pieces, grad_value, grad_decay);

    // Nor is the gradient of h.
    at::Tensor grad_step = grad_h;
    at::Tensor input_sums = at::empty({warps, kInputSums, channels}, options);
    launch_over_rows<scalar_t>(
        input_backward_kernel<scalar_t>,
        rows.rows,
        channels,
        kInputSums,
        rows,
        grad_mixed.const_data_ptr<scalar_t>(),
        grad_value.const_data_ptr<scalar_t>(),
        grad_decay.const_data_ptr<scalar_t>(),
        InputGradients<scalar_t>{
            grads.x.mutable_data_ptr<scalar_t>(),
            grads.b.mutable_data_ptr<scalar_t>(),
            grad_step.mutable_data_ptr<scalar_t>(),
            input_sums.mutable_data_ptr<scalar_t>()});

    const at::Tensor of_output = output_sums.sum(0), of_input = input_sums.sum(0);
    grads.Ds = of_output[kSkip].clone();
    grads.h_norm_weight = of_output[kHNormWeight].clone();
    grads.h_norm_bias = of_output[kHNormBias].clone();
    grads.out_norm_weight = of_output[kOutNormWeight].clone();
    grads.out_norm_bias = of_output[kOutNormBias].clone();
    grads.dt_bias = of_input[kBias].clone();
    grads.A_log = of_input[kRate].mul(prepared.rate);
    grads.dt = at::matmul(grad_step, prepared.in.dt_weight);
    grads.dt_weight = at::matmul(grad_step.flatten(0, 1).t(), prepared.in.dt.flatten(0, 1));
  });
  return grads;
}

struct Cuda {
  // The device of the inputs, and float32 also for the matrix products, whatever autocast the caller is in.
  struct Scope {
    explicit Scope(c10::Device device) : device(device), no_autocast(c10::autocast_dispatch_keyset) {}

    c10::cuda::CUDAGuard device;
    c10::impl::ExcludeDispatchKeyGuard no_autocast;
  };

  static constexpr auto forward = &selective_scan_forward;
  static constexpr auto backward = &selective_scan_backward;
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("tree_selective_scan", &SelectiveScanOperators<Cuda>::forward);
  m.impl("tree_selective_scan_backward", &SelectiveScanOperators<Cuda>::backward);
}

}  // namespace grootvl::cuda
