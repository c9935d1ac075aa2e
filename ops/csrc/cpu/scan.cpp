// CPU kernels of the tree scan. One thread computes a whole channel of an image in a fixed order, so results do not
// depend on the number of threads.
#include "scan.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/trees.h"

namespace grootvl::cpu {

namespace {

// An image of the batch or, if there are fewer images than threads, a range of its channels.
struct Task {
  int64_t image, first, width;
};

template <typename Run>
void for_each_task(const at::Tensor& x, const Run& run) {
  constexpr int64_t kCacheLine = 64;
  const int64_t batch = x.size(0), channels = x.size(2);
  const int64_t threads_an_image = (at::get_num_threads() + batch - 1) / batch;
  const int64_t multiple = kCacheLine / x.element_size();
  const int64_t width = at::divup(at::divup(channels, threads_an_image), multiple) * multiple;
  const int64_t shares = at::divup(channels, width);
  at::parallel_for(0, batch * shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> has_sum(x.size(1));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % shares * width;
      std::fill(has_sum.begin(), has_sum.end(), 0);
      run(Task{task / shares, first, std::min(width, channels - first)}, has_sum.data());
    }
  });
}

template <typename scalar_t>
Rows<const scalar_t> rows_of(const at::Tensor& input, const Task& task) {
  const int64_t vertices = input.size(1), channels = input.size(2);
  return {input.const_data_ptr<scalar_t>() + task.image * vertices * channels + task.first, channels};
}

template <typename scalar_t>
Rows<scalar_t> rows_of_result(at::Tensor& result, const Task& task) {
  const int64_t vertices = result.size(1), channels = result.size(2);
  return {result.mutable_data_ptr<scalar_t>() + task.image * vertices * channels + task.first, channels};
}

struct Cpu {
  using Scope = NoScope;

  static bool computes(const at::Tensor&) {
    return true;
  }

  static void forward(
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      const OptionalTensor&,
      Propagation propagation,
      at::Tensor& h) {
    const Trees trees(parent, order);
    const at::Tensor x_rows = x.contiguous(), decay_rows = decay.contiguous();
    with_scalar(x.scalar_type(), [&](auto zero) {
      using stored_t = decltype(zero);
      using acc_t = Accumulated<stored_t>;
      constexpr int64_t kMaps = std::is_same_v<acc_t, stored_t> ? 0 : 1;
      for_each_task(x_rows, [&](const Task& task, uint8_t* has_sum) {
        const Scratch<acc_t> scratch(kMaps, x.size(1), task.width);
        const Rows<stored_t> results = rows_of_result<stored_t>(h, task);
        with_kernels([&](auto kernels) {
          kernels.scan(
              trees[task.image],
              task.width,
              propagation,
              rows_of<stored_t>(decay_rows, task),
              rows_of<stored_t>(x_rows, task),
              scratch.in_place_of(results, 0),
              results,
              has_sum);
        });
      });
    });
  }

  static void backward(
      const at::Tensor& grad_h,
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      const OptionalTensor&,
      Propagation propagation,
      at::Tensor& grad_x,
      at::Tensor& grad_decay) {
    const Trees trees(parent, order);
    const at::Tensor grad_rows = grad_h.contiguous(), x_rows = x.contiguous(), decay_rows = decay.contiguous();
    with_scalar(x.scalar_type(), [&](auto zero) {
      using stored_t = decltype(zero);
      using acc_t = Accumulated<stored_t>;
      constexpr int64_t kMaps = std::is_same_v<acc_t, stored_t> ? 1 : 3;
      for_each_task(x_rows, [&](const Task& task, uint8_t* has_sum) {
        const Scratch<acc_t> scratch(kMaps, x.size(1), task.width, Rest::kKept);
        const Rows<stored_t> of_x = rows_of_result<stored_t>(grad_x, task);
        const Rows<stored_t> of_decay = rows_of_result<stored_t>(grad_decay, task);
        const ScanSums<acc_t> sums{scratch.in_place_of(of_decay, 1), scratch.in_place_of(of_x, 2), scratch[0]};
        with_kernels([&](auto kernels) {
          kernels.scan_backward(
              trees[task.image],
              task.width,
              propagation,
              rows_of<stored_t>(grad_rows, task),
              rows_of<stored_t>(decay_rows, task),
              rows_of<stored_t>(x_rows, task),
              sums,
              of_x,
              of_decay,
              has_sum);
        });
      });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("tree_scan", &ScanOperators<Cpu>::forward);
  m.impl("tree_scan_backward", &ScanOperators<Cpu>::backward);
}

}  // namespace grootvl::cpu
