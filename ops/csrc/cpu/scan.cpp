// CPU kernels of the tree scan. Every channel of an image is computed by one thread in one order, so results do not
// depend on the number of threads.
#include "scan.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/trees.h"

namespace grootvl::cpu {

namespace {

// Images of a batch, and where there are fewer of them than threads, shares of their channels.
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

  static bool computes(const at::Tensor& x) {
    return !is_16_bit(x);
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
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tree_scan", [&] {
      for_each_task(x_rows, [&](const Task& task, uint8_t* has_sum) {
        with_kernels([&](auto kernels) {
          kernels.template scan<scalar_t>(
              trees[task.image],
              task.width,
              propagation,
              rows_of<scalar_t>(decay_rows, task),
              rows_of<scalar_t>(x_rows, task),
              rows_of_result<scalar_t>(h, task),
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
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tree_scan_backward", [&] {
      for_each_task(x_rows, [&](const Task& task, uint8_t* has_sum) {
        const c10::DataPtr memory = c10::GetCPUAllocator()->allocate(x.size(1) * task.width * sizeof(scalar_t));
        with_kernels([&](auto kernels) {
          kernels.template scan_backward<scalar_t>(
              trees[task.image],
              task.width,
              propagation,
              rows_of<scalar_t>(grad_rows, task),
              rows_of<scalar_t>(decay_rows, task),
              rows_of<scalar_t>(x_rows, task),
              rows_of_result<scalar_t>(grad_x, task),
              rows_of_result<scalar_t>(grad_decay, task),
              Rows<scalar_t>{static_cast<scalar_t*>(memory.get()), task.width},
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
