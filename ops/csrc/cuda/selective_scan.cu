// CUDA operators of the selective scan. The scan computes decays and inputs from the low-rank step sizes while it loads
// them; what follows it is one kernel over rows. Tensors are read and written as they are stored, and computed in
// float32 (float64 in float64).
//
// Gradients of parameters are summed up by each block over its rows, which depend on the number of rows only, and then
// over the blocks, so they do not change from run to run.
#include "selective_scan.h"

#include <ATen/Context.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/piece_scan.cuh"
#include "cuda/selective_input.cuh"
#include "cuda/selective_input_backward.cuh"
#include "cuda/selective_rows.cuh"

namespace grootvl::cuda {

namespace {

// Blocks that share the rows: enough to fill a large GPU, few enough that their sums stay small. Sums must not depend
// on the device, so the number does not either.
constexpr int64_t kMostRowBlocks = 2048;

// Lanes that hold a row in kLanePacks packs each: a power of two.
int count_row_lanes(int64_t channels, int pack) {
  int64_t lanes = 1;
  while (lanes * kLanePacks * pack < channels) {
    lanes *= 2;
  }
  TORCH_CHECK_VALUE(
      lanes <= kMostRowLanes,
      "tree_selective_scan on CUDA takes up to ",
      kMostRowLanes * kLanePacks * pack,
      " channels of this dtype, got ",
      channels);
  return static_cast<int>(lanes);
}

// How kernels over rows are launched.
struct RowLaunch {
  int lanes, threads;
  int64_t blocks;

  RowLaunch(int64_t rows, int64_t channels, int pack)
      : lanes(count_row_lanes(channels, pack)),
        threads(std::max(lanes, kRowThreads)),
        blocks(std::min(divide_up<int64_t>(rows, is_wide() ? 1 : threads / lanes), kMostRowBlocks)) {
    threads = is_wide() ? lanes : threads;
  }
  bool is_wide() const {
    return lanes > kWarpSize;
  }
  // Calls run(the most threads of the kernel's blocks), as a type.
  template <typename Run>
  void with_most_threads(const Run& run) const {
    if (threads <= kRowThreads && !is_wide()) {
      run(std::integral_constant<int, kRowThreads>());
    } else if (threads <= kWideRowThreads) {
      run(std::integral_constant<int, kWideRowThreads>());
    } else {
      run(std::integral_constant<int, kMostRowLanes>());
    }
  }
};

// The inputs as the kernels read them: activations T, parameters acc_t.
template <typename T, int kPack>
struct Prepared {
  using acc_t = Computed<T>;
  using between_t = Between<T>;

  SelectiveScanInputs in;
  PieceTensors trees;
  Propagation propagation;
  double eps;

  Prepared(
      const SelectiveScanInputs& inputs,
      const at::Tensor& parent,
      const at::Tensor& order,
      const OptionalTensor& cut,
      double eps,
      Propagation propagation)
      : in(inputs.map_parts(
            [](const at::Tensor& activation) { return readable_rows(activation, 1); },
            [](const at::Tensor& parameter) {
              return readable_vector(parameter.to(c10::CppTypeToScalarType<acc_t>::value), kPack);
            })),
        trees(cut_trees(parent, order, cut)),
        propagation(propagation),
        eps(eps) {
    in.x = readable_rows(in.x, kPack);
    in.gate = readable_rows(in.gate, kPack);
  }

  int64_t rows() const {
    return in.x.size(0) * in.x.size(1);
  }

  at::TensorOptions accumulated() const {
    return in.x.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  }

  // Rows (B, L, D) for results that only other kernels read.
  at::Tensor between() const {
    return at::empty(in.x.sizes(), in.x.options().dtype(c10::CppTypeToScalarType<between_t>::value));
  }

  // What a scan of one or both streams reads; grad_h if one of them is the gradient of h.
  template <bool kValues, bool kGradients>
  SelectiveInput<T, between_t, acc_t, kPack, kValues, kGradients> scan_input(const at::Tensor& grad_h = {}) const {
    return {
        {rows_of<T>(in.dt),
         in.dt_weight.const_data_ptr<acc_t>(),
         in.dt_bias.const_data_ptr<acc_t>(),
         static_cast<int>(in.dt.size(2)),
         in.x.size(2)},
        rows_of<T>(in.x),
        rows_of<T>(in.b),
        kGradients ? rows_of<between_t>(grad_h) : Rows<const between_t>{nullptr, 0},
        in.A_log.const_data_ptr<acc_t>()};
  }

  // The forward scan.
  Joined<acc_t, 1> scan(at::Tensor& h) const {
    return scan_forward<between_t, acc_t, kPack>(scan_input<true, false>(), propagation, trees.pieces, h);
  }

  RowInputs<T, between_t, acc_t> row_inputs(const at::Tensor& h) const {
    return {
        rows_of<T>(in.x),
        rows_of<T>(in.gate),
        rows_of<T>(in.c),
        rows_of<between_t>(h),
        {in.Ds.const_data_ptr<acc_t>(),
         in.h_norm_weight.const_data_ptr<acc_t>(),
         in.h_norm_bias.const_data_ptr<acc_t>(),
         in.out_norm_weight.const_data_ptr<acc_t>(),
         in.out_norm_bias.const_data_ptr<acc_t>()},
        rows(),
        in.x.size(2),
        static_cast<acc_t>(eps)};
  }
};

template <typename T, int kPack>
void run_forward(const Prepared<T, kPack>& prepared, at::Tensor& y) {
  using acc_t = Computed<T>;
  using between_t = Between<T>;
  at::Tensor h = prepared.between();
  prepared.scan(h);
  const RowLaunch over(prepared.rows(), y.size(2), kPack);
  over.with_most_threads([&](auto most_threads) {
    launch(
        output_kernel<decltype(most_threads)::value, T, between_t, acc_t, kPack>,
        blocks_in_row(over.blocks),
        over.threads,
        0,
        prepared.row_inputs(h),
        y.mutable_data_ptr<T>(),
        over.lanes);
  });
}

template <typename T, int kPack>
void run_backward(const Prepared<T, kPack>& prepared, const at::Tensor& grad_y, SelectiveScanInputs& grads) {
  using acc_t = Computed<T>;
  using between_t = Between<T>;
  const int64_t rows = prepared.rows(), channels = grad_y.size(2);
  const auto options = prepared.accumulated();
  const at::Tensor grad_rows = readable_rows(grad_y, kPack);

  at::Tensor h = prepared.between(), grad_mixed = prepared.between(), grad_h = prepared.between();
  const Joined<acc_t, 1> forward = prepared.scan(h);
  const RowLaunch over(rows, channels, kPack);
  const at::Tensor output_sums = at::empty({over.blocks, kOutputSums, channels}, options);
  over.with_most_threads([&](auto most_threads) {
    constexpr int kMostThreads = decltype(most_threads)::value;
    launch(
        output_backward_kernel<kMostThreads, T, between_t, acc_t, kPack>,
        blocks_in_row(over.blocks),
        over.threads,
        ChannelSums<(kMostThreads > kRowThreads), acc_t, kPack>::kSharedBytes,
        prepared.row_inputs(h),
        rows_of<T>(grad_rows),
        OutputGradients<T, between_t, acc_t>{
            {grads.gate.mutable_data_ptr<T>(), channels},
            grads.c.mutable_data_ptr<T>(),
            grad_mixed.mutable_data_ptr<between_t>(),
            grad_h.mutable_data_ptr<between_t>(),
            output_sums.mutable_data_ptr<acc_t>()},
        over.lanes);
  });

  const int64_t rank = prepared.in.dt.size(2), channel_tiles = divide_up<int64_t>(channels, kRowLanes * kPack);
  const bool sums_products = rank <= kMostSummedRank<kPack>;
  // A tile's rows of the gradient of h are in shared memory before those of the step's are written.
  const at::Tensor grad_step = grad_h;
  const Pieces& pieces = prepared.trees.pieces;
  const int64_t images = grads.x.size(0), tiles = images * tiling_of<acc_t, kPack, 2>(pieces).tiles;
  const int64_t sums_of_tile = kInputSums + (sums_products ? rank : 0);
  const at::Tensor b_parts = at::empty({rows, channel_tiles}, options);
  const at::Tensor dt_parts = at::empty({rows, channel_tiles, sums_products ? rank : 0}, grad_step.options());
  const at::Tensor input_sums = at::empty({tiles, sums_of_tile, channels}, options);
  with_directions(prepared.propagation, [&](auto directions) {
    using Of = decltype(directions);
    // h is not needed any more. The values have been scanned.
    at::Tensor memory;
    const Partials<acc_t, 1> partials{{partial_rows<acc_t>(h, memory)}};
    const auto backward = scan_criticals<typename Of::Backward, acc_t, kPack>(
        prepared.template scan_input<false, true>(grad_h), partials, pieces, images, channels, options);
    const SelectiveGradients<Of::Forward::of(0), T, between_t, acc_t, kPack> output{
        prepared.template scan_input<true, false>(),
        grad_mixed.const_data_ptr<between_t>(),
        prepared.in.Ds.template const_data_ptr<acc_t>(),
        grads.x.mutable_data_ptr<T>(),
        sums_products ? nullptr : grad_step.mutable_data_ptr<between_t>(),
        b_parts.mutable_data_ptr<acc_t>(),
        dt_parts.mutable_data_ptr<between_t>(),
        input_sums.mutable_data_ptr<acc_t>(),
        static_cast<int>(sums_of_tile),
        static_cast<int>(channel_tiles)};
    finish_pieces<typename Of::Both, acc_t, kPack>(
        prepared.template scan_input<true, true>(grad_h),
        output,
        Ends<acc_t, 2>{{forward.ends.sum[0], backward.ends.sum[0]}, {forward.ends.result[0], backward.ends.result[0]}},
        pieces,
        images,
        channels);
  });

  const at::Tensor of_output = output_sums.sum(0), of_input = input_sums.sum(0);
  grads.b = b_parts.sum(-1).view(grads.b.sizes()).to(grads.b.scalar_type());
  // One kernel copies all, since results of an operator must not share memory. The rate is -exp(A_log).
  const std::vector<at::Tensor> of_parameters = at::_foreach_mul(
      {of_output[kSkip],
       of_output[kHNormWeight],
       of_output[kHNormBias],
       of_output[kOutNormWeight],
       of_output[kOutNormBias],
       of_input[kBias],
       of_input[kRate]},
      std::vector<at::Scalar>{1, 1, 1, 1, 1, 1, -1});
  int parameter = 0;
  for (at::Tensor* grad :
       {&grads.Ds,
        &grads.h_norm_weight,
        &grads.h_norm_bias,
        &grads.out_norm_weight,
        &grads.out_norm_bias,
        &grads.dt_bias}) {
    *grad = of_parameters[parameter++].to(grad->scalar_type());
  }
  grads.A_log = of_parameters[parameter].mul(prepared.in.A_log.exp()).to(grads.A_log.scalar_type());
  if (sums_products) {
    grads.dt = dt_parts.sum(1).view(grads.dt.sizes()).to(grads.dt.scalar_type());
    grads.dt_weight = of_input.slice(0, kInputSums).t().contiguous().to(grads.dt_weight.scalar_type());
    return;
  }
  // The products are as exact as the kernels, whatever precision the caller allows for matrix products of their own.
  const at::NoTF32Guard full_precision;
  const auto between = grad_step.scalar_type();
  const at::Tensor step_rows = grad_step.flatten(0, 1), dt_rows = prepared.in.dt.to(between).flatten(0, 1);
  grads.dt = at::matmul(grad_step, prepared.in.dt_weight.to(between)).to(grads.dt.scalar_type());
  grads.dt_weight = at::matmul(step_rows.t(), dt_rows).to(grads.dt_weight.scalar_type());
}

at::Tensor selective_scan_forward(
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    const OptionalTensor& cut,
    double eps,
    Propagation propagation) {
  at::Tensor y = at::empty(inputs.x.sizes(), inputs.x.options());
  if (y.numel() > 0) {
    for_rows(inputs.x, [&](auto stored, auto pack) {
      run_forward(Prepared<decltype(stored), decltype(pack)::value>(inputs, parent, order, cut, eps, propagation), y);
    });
  }
  return y;
}

SelectiveScanInputs selective_scan_backward(
    const at::Tensor& grad_y,
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    const OptionalTensor& cut,
    double eps,
    Propagation propagation) {
  SelectiveScanInputs grads =
      inputs.map([](const at::Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); });
  if (inputs.x.numel() == 0) {
    return grads.map([](const at::Tensor& grad) { return grad.zero_(); });
  }
  for_rows(inputs.x, [&](auto stored, auto pack) {
    run_backward(
        Prepared<decltype(stored), decltype(pack)::value>(inputs, parent, order, cut, eps, propagation), grad_y, grads);
  });
  return grads;
}

struct Cuda {
  // The device of the inputs, and the dtypes of the operands also in matrix products, whatever autocast the caller is
  // in.
  struct Scope {
    explicit Scope(c10::Device device) : device(device), no_autocast(c10::autocast_dispatch_keyset) {}

    c10::cuda::CUDAGuard device;
    c10::impl::ExcludeDispatchKeyGuard no_autocast;
  };

  static bool computes(const at::Tensor& x) {
    return computes_rows(x);
  }

  static constexpr auto forward = &selective_scan_forward;
  static constexpr auto backward = &selective_scan_backward;
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("tree_selective_scan", &SelectiveScanOperators<Cuda>::forward);
  m.impl("tree_selective_scan_backward", &SelectiveScanOperators<Cuda>::backward);
}

}  // namespace grootvl::cuda
