// CPU kernels of the selective scan, parallel over the images of a batch or, if there are fewer images than threads,
// over the vertices of an image in row-wise steps and over its channels in the scan. Sums over vertices are computed
// piece by piece and added in a fixed order, so results do not depend on the number of threads.
#include "selective_scan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/trees.h"

namespace grootvl::cpu {
namespace {

// The vertices that a thread processes at a time in a row-wise step.
constexpr int64_t kPiece = 256;

// The tensor if its rows are evenly strided, as in a slice of a projection's output; otherwise a contiguous copy.
at::Tensor evenly_strided(const at::Tensor& tensor) {
  const bool even = tensor.stride(2) == 1 && tensor.stride(0) == tensor.size(1) * tensor.stride(1);
  return even ? tensor : tensor.contiguous();
}

template <typename scalar_t>
Rows<const scalar_t> rows_of(const at::Tensor& tensor, int64_t image) {
  return {tensor.const_data_ptr<scalar_t>() + image * tensor.stride(0), tensor.stride(1)};
}

template <typename scalar_t>
Rows<scalar_t> rows_of_result(const at::Tensor& tensor, int64_t image) {
  return {tensor.mutable_data_ptr<scalar_t>() + image * tensor.stride(0), tensor.stride(1)};
}

// The inputs as the kernels read them: activations in their own dtype, parameters in the accumulation dtype.
struct Prepared {
  explicit Prepared(const SelectiveScanInputs& inputs)
      : in(inputs.map_parts(evenly_strided, [&](const at::Tensor& parameter) {
          return parameter.to(accumulated_dtype(inputs.x.scalar_type())).contiguous();
        })) {
    in.dt_weight = in.dt_weight.t().contiguous();
    in.A_log = -in.A_log.exp();
  }

  template <typename stored_t>
  Selective<stored_t> of_image(int64_t image, double eps) const {
    using acc_t = Accumulated<stored_t>;
    return {
        in.x.size(2),
        in.dt.size(2),
        static_cast<acc_t>(eps),
        rows_of<stored_t>(in.x, image),
        rows_of<stored_t>(in.dt, image),
        rows_of<stored_t>(in.b, image),
        rows_of<stored_t>(in.c, image),
        rows_of<stored_t>(in.gate, image),
        in.dt_weight.const_data_ptr<acc_t>(),
        in.dt_bias.const_data_ptr<acc_t>(),
        in.A_log.const_data_ptr<acc_t>(),
        in.Ds.const_data_ptr<acc_t>(),
        in.h_norm_weight.const_data_ptr<acc_t>(),
        in.h_norm_bias.const_data_ptr<acc_t>(),
        in.out_norm_weight.const_data_ptr<acc_t>(),
        in.out_norm_bias.const_data_ptr<acc_t>()};
  }

  // dt_weight is transposed, and A_log holds -exp(A_log).
  SelectiveScanInputs in;
};

// Parallel over images if there are enough of them; otherwise one by one, and the steps inside are parallel.
template <typename Run>
void for_each_image(int64_t batch, const Run& run) {
  if (batch >= at::get_num_threads()) {
    at::parallel_for(0, batch, 1, run);
  } else {
    run(0, batch);
  }
}

template <typename Run>
void for_each_piece(int64_t vertices, const Run& run) {
  at::parallel_for(0, at::divup(vertices, kPiece), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      run(piece, piece * kPiece, std::min((piece + 1) * kPiece, vertices));
    }
  });
}

template <typename Run>
void for_each_share(int64_t channels, const Run& run) {
  const int64_t shares = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t width = at::divup(at::divup(channels, shares), 16) * 16;
  at::parallel_for(0, at::divup(channels, width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      run(share * width, std::min(width, channels - share * width));
    }
  });
}

// Scans h, which holds the input, in place.
template <typename Kernels, typename acc_t>
void scan_in_place(
    Kernels,
    const Tree& tree,
    int64_t channels,
    Propagation propagation,
    const Rows<acc_t>& decay,
    const Rows<acc_t>& h) {
  for_each_share(channels, [&](int64_t first, int64_t width) {
    std::vector<uint8_t> has_sum(tree.vertices, 1);
    const Rows<acc_t> part = h.from(first);
    Kernels::template scan<acc_t, acc_t, acc_t>(
        tree, width, propagation, decay.from(first), part, part, part, has_sum.data());
  });
}

at::Tensor selective_scan_forward(
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    const OptionalTensor&,
    double eps,
    Propagation propagation) {
  at::Tensor y = at::empty(inputs.x.sizes(), inputs.x.options());
  if (y.numel() == 0) {
    return y;
  }
  const Trees trees(parent, order);
  const Prepared prepared(inputs);
  const int64_t vertices = y.size(1), channels = y.size(2), rank = inputs.dt.size(2);
  with_scalar(y.scalar_type(), [&](auto zero) {
    using stored_t = decltype(zero);
    using acc_t = Accumulated<stored_t>;
    with_kernels([&](auto kernels) {
      using Kernels = decltype(kernels);
      for_each_image(y.size(0), [&](int64_t begin, int64_t end) {
        const Scratch<acc_t> scratch(2, vertices, channels);
        const Rows<acc_t> decay = scratch[0], h = scratch[1];
        for (int64_t image = begin; image < end; ++image) {
          const Selective<stored_t> s = prepared.of_image<stored_t>(image, eps);
          for_each_piece(vertices, [&](int64_t, int64_t first, int64_t last) {
            std::vector<acc_t> tile(Kernels::tile_size(channels, rank));
            kernels.discretize(s, first, last, decay, h, tile.data());
          });
          scan_in_place(kernels, trees[image], channels, propagation, decay, h);
          for_each_piece(vertices, [&](int64_t, int64_t first, int64_t last) {
            std::vector<acc_t> row(channels);
            kernels.read_out(s, first, last, h, rows_of_result<stored_t>(y, image), row.data());
          });
        }
      });
    });
  });
  return y;
}

// Partial sums of the gradients of the parameters, a row for each piece of each image.
class ParameterGradients {
 public:
  ParameterGradients(const at::Tensor& x, int64_t rank)
      : channels_(x.size(2)),
        rank_(rank),
        pieces_(at::divup(x.size(1), kPiece)),
        rows_(
            at::zeros(
                {x.size(0) * pieces_, (rank + 7) * channels_}, x.options().dtype(accumulated_dtype(x.scalar_type())))) {
  }

  template <typename stored_t>
  SelectiveGradients<stored_t> of_piece(SelectiveGradients<stored_t> g, int64_t image, int64_t piece) const {
    using acc_t = Accumulated<stored_t>;
    acc_t* row = rows_.mutable_data_ptr<acc_t>() + (image * pieces_ + piece) * rows_.size(1);
    g.dt_weight = row;
    row += rank_ * channels_;
    for (acc_t** part :
         {&g.dt_bias, &g.rate, &g.skip, &g.h_norm_weight, &g.h_norm_bias, &g.out_norm_weight, &g.out_norm_bias}) {
      *part = row;
      row += channels_;
    }
    return g;
  }

  // The gradient of dt_weight (rank, channels), then the seven of (channels), in the order above.
  template <typename scalar_t>
  std::vector<at::Tensor> sums() const {
    const at::Tensor total = at::zeros({rows_.size(1)}, rows_.options());
    scalar_t* to = total.mutable_data_ptr<scalar_t>();
    const scalar_t* from = rows_.const_data_ptr<scalar_t>();
    at::parallel_for(0, rows_.size(1), 1024, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < rows_.size(0); ++row) {
        for (int64_t i = begin; i < end; ++i) {
          to[i] += from[row * rows_.size(1) + i];
        }
      }
    });
    std::vector<at::Tensor> parts{total.narrow(0, 0, rank_ * channels_).view({rank_, channels_})};
    for (int64_t part = 0; part < 7; ++part) {
      parts.push_back(total.narrow(0, (rank_ + part) * channels_, channels_).clone());
    }
    return parts;
  }

 private:
  int64_t channels_, rank_, pieces_;
  at::Tensor rows_;
};

SelectiveScanInputs selective_scan_backward(
    const at::Tensor& grad_y,
    const SelectiveScanInputs& inputs,
    const at::Tensor& parent,
    const at::Tensor& order,
    const OptionalTensor&,
    double eps,
    Propagation propagation) {
  SelectiveScanInputs grads =
      inputs.map([](const at::Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); });
  if (inputs.x.numel() == 0) {
    return grads.map([](const at::Tensor& grad) { return grad.zero_(); });
  }
  const Trees trees(parent, order);
  const Prepared prepared(inputs);
  const at::Tensor grad_rows = evenly_strided(grad_y);
  const int64_t vertices = inputs.x.size(1), channels = inputs.x.size(2), rank = inputs.dt.size(2);
  with_scalar(inputs.x.scalar_type(), [&](auto zero) {
    using stored_t = decltype(zero);
    using acc_t = Accumulated<stored_t>;
    // The gradient through the skip connection needs a map of its own unless grad_x is stored as acc_t.
    constexpr int64_t kMaps = std::is_same_v<stored_t, acc_t> ? 4 : 5;
    const ParameterGradients parameters(inputs.x, rank);
    with_kernels([&](auto kernels) {
      using Kernels = decltype(kernels);
      for_each_image(inputs.x.size(0), [&](int64_t begin, int64_t end) {
        const Scratch<acc_t> scratch(kMaps, vertices, channels, Rest::kKept);
        // The backward scan overwrites grad (of h) with the gradient of the input, and sums with that of the decay.
        const Rows<acc_t> decay = scratch[0], sums = scratch[1], h = scratch[2], grad = scratch[3];
        for (int64_t image = begin; image < end; ++image) {
          const Tree tree = trees[image];
          const Selective<stored_t> s = prepared.of_image<stored_t>(image, eps);
          SelectiveGradients<stored_t> of_inputs{
              rows_of_result<stored_t>(grads.x, image),
              rows_of_result<stored_t>(grads.dt, image),
              rows_of_result<stored_t>(grads.b, image),
              rows_of_result<stored_t>(grads.c, image),
              rows_of_result<stored_t>(grads.gate, image)};
          of_inputs.x_by_skip = scratch.in_place_of(of_inputs.x, 4);
          for_each_piece(vertices, [&](int64_t, int64_t first, int64_t last) {
            std::vector<acc_t> tile(Kernels::tile_size(channels, rank));
            kernels.discretize(s, first, last, decay, sums, tile.data());
          });
          for_each_share(channels, [&](int64_t first, int64_t width) {
            std::vector<uint8_t> flags(vertices);
            Kernels::template scan_keeping_sums<acc_t>(
                tree, width, propagation, decay.from(first), sums.from(first), h.from(first), flags.data());
          });
          for_each_piece(vertices, [&](int64_t piece, int64_t first, int64_t last) {
            std::vector<acc_t> rows(2 * channels);
            kernels.read_out_backward(
                s,
                first,
                last,
                h,
                rows_of<stored_t>(grad_rows, image),
                grad,
                parameters.of_piece(of_inputs, image, piece),
                rows.data());
          });
          for_each_share(channels, [&](int64_t first, int64_t width) {
            std::vector<uint8_t> flags(vertices);
            Kernels::template scan_backward_from_sums<acc_t>(
                tree,
                width,
                propagation,
                decay.from(first),
                sums.from(first),
                h.from(first),
                grad.from(first),
                flags.data());
          });
          for_each_piece(vertices, [&](int64_t piece, int64_t first, int64_t last) {
            std::vector<acc_t> rows(Kernels::tile_size(channels, rank) + channels);
            kernels.discretize_backward(
                s, first, last, decay, grad, sums, parameters.of_piece(of_inputs, image, piece), rows.data());
          });
        }
      });
    });
    const std::vector<at::Tensor> totals = parameters.sums<acc_t>();
    const auto as = [](const at::Tensor& grad, const at::Tensor& value) { return grad.to(value.scalar_type()); };
    grads.dt_weight = as(totals[0].t().contiguous(), grads.dt_weight);
    grads.dt_bias = as(totals[1], grads.dt_bias);
    grads.A_log = as(totals[2].mul(prepared.in.A_log), grads.A_log);
    grads.Ds = as(totals[3], grads.Ds);
    grads.h_norm_weight = as(totals[4], grads.h_norm_weight);
    grads.h_norm_bias = as(totals[5], grads.h_norm_bias);
    grads.out_norm_weight = as(totals[6], grads.out_norm_weight);
    grads.out_norm_bias = as(totals[7], grads.out_norm_bias);
  });
  return grads;
}

struct Cpu {
  using Scope = NoScope;

  static bool computes(const at::Tensor&) {
    return true;
  }

  static constexpr auto forward = &selective_scan_forward;
  static constexpr auto backward = &selective_scan_backward;
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("tree_selective_scan", &SelectiveScanOperators<Cpu>::forward);
  m.impl("tree_selective_scan_backward", &SelectiveScanOperators<Cpu>::backward);
}

}  // namespace grootvl::cpu
