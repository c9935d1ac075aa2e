// CPU kernels of the tree scan. Work is split by image and block of channels; every block is computed by one thread in
// one order, so results do not depend on the number of threads.
#include "scan.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"

namespace grootvl::cpu {

// The tree of one image.
struct Tree {
  const int32_t* parent;
  const int32_t* order;
  int64_t vertices;
};

namespace baseline {
#include "cpu/scan_kernels.inc"
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu/scan_kernels.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "cpu/scan_kernels.inc"
}
#pragma GCC pop_options
#else
namespace avx2 = baseline;
namespace avx512 = baseline;
#endif

namespace {

// Every vertex once, the root first, each parent before its children.
bool is_topological(const int32_t* parent, const int32_t* order, int64_t vertices) {
  std::vector<uint8_t> seen(vertices, 0);
  const auto inside = [vertices](int32_t v) { return static_cast<uint32_t>(v) < static_cast<uint64_t>(vertices); };
  for (int64_t i = 0; i < vertices; ++i) {
    const int32_t v = order[i];
    if (!inside(v) || !inside(parent[v]) || seen[v] || (i == 0) != (parent[v] == v) || (i > 0 && !seen[parent[v]])) {
      return false;
    }
    seen[v] = 1;
  }
  return true;
}

void check_trees(const at::Tensor& parent, const at::Tensor& order) {
  const int64_t vertices = parent.size(1);
  const int32_t* parents = parent.const_data_ptr<int32_t>();
  const int32_t* orders = order.const_data_ptr<int32_t>();
  std::atomic<int64_t> bad{-1};
  at::parallel_for(0, parent.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (!is_topological(parents + b * vertices, orders + b * vertices, vertices)) {
        bad = b;
      }
    }
  });
  TORCH_CHECK_VALUE(
      bad < 0,
      "parent and order must be a rooted tree with every parent before its children, as grid_tree returns them; "
      "those of image ",
      bad.load(),
      " are not");
}

// Channels that one thread takes through the tree together: few enough that the rows of an image stay in the cache.
int64_t block_width(int64_t vertices, int64_t channels, int64_t value_size) {
  constexpr int64_t kCacheBytes = 1 << 20;
  for (const int64_t width : {64, 32}) {
    if (channels % width == 0 && vertices * width * value_size * 3 <= kCacheBytes) {
      return width;
    }
  }
  return channels % 32 == 0 ? 32 : 16;
}

// One block of channels of one image.
struct Block {
  int64_t offset;
  int64_t width;
};

template <typename Call>
void with_kernels(const Call& call) {
  switch (isa()) {
    case Isa::kAvx512:
      return call(avx512::Kernels());
    case Isa::kAvx2:
      return call(avx2::Kernels());
    case Isa::kBaseline:
      return call(baseline::Kernels());
  }
}

// The width is compiled in where it is one of the usual ones; 0 stands for any other.
template <typename Call>
void with_width(int64_t width, const Call& call) {
  switch (width) {
    case 16:
      return call(std::integral_constant<int, 16>());
    case 32:
      return call(std::integral_constant<int, 32>());
    case 64:
      return call(std::integral_constant<int, 64>());
    default:
      return call(std::integral_constant<int, 0>());
  }
}

// Calls run(kernels, compiled width, block, tree, scratch) for every image and block of channels, on all threads. The
// scratch holds `buffers` rows of the block for each vertex.
template <typename acc_t, typename Run>
void for_each_block(
    const at::Tensor& parent, const at::Tensor& order, int64_t channels, int64_t buffers, const Run& run) {
  const int64_t vertices = parent.size(1);
  const int64_t width = block_width(vertices, channels, sizeof(acc_t));
  const int64_t blocks = (channels + width - 1) / width;
  at::parallel_for(0, parent.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    // From c10's allocator, which aligns to cache lines.
    const c10::DataPtr memory = c10::GetCPUAllocator()->allocate(buffers * vertices * width * sizeof(acc_t));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks;
      const int64_t first = task % blocks * width;
      const Tree tree{
          parent.const_data_ptr<int32_t>() + image * vertices,
          order.const_data_ptr<int32_t>() + image * vertices,
          vertices};
      const Block block{image * vertices * channels + first, std::min(width, channels - first)};
      with_width(block.width, [&](auto known) {
        with_kernels([&](auto kernels) { run(kernels, known, block, tree, static_cast<acc_t*>(memory.get())); });
      });
    }
  });
}

}  // namespace

at::Tensor tree_scan(
    const at::Tensor& x,
    const at::Tensor& decay,
    const at::Tensor& parent,
    const at::Tensor& order,
    std::string_view propagation_name) {
  const Propagation propagation = parse_propagation(propagation_name);
  check_scan_inputs(x, decay, parent, order);
  const at::Tensor x_rows = x.contiguous(), decay_rows = decay.contiguous();
  const at::Tensor parents = parent.contiguous(), orders = order.contiguous();
  at::Tensor h = at::empty(x.sizes(), x.options());
  if (h.numel() == 0) {
    return h;
  }
  check_trees(parents, orders);
  const int64_t channels = x.size(2);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "tree_scan", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* xs = x_rows.const_data_ptr<scalar_t>();
    const scalar_t* decays = decay_rows.const_data_ptr<scalar_t>();
    scalar_t* hs = h.mutable_data_ptr<scalar_t>();
    for_each_block<acc_t>(
        parents, orders, channels, 1, [&](auto kernels, auto known, Block block, Tree tree, acc_t* u) {
          decltype(kernels)::template scan<decltype(known)::value>(
              xs + block.offset, decays + block.offset, hs + block.offset, channels, block.width, tree, propagation, u);
        });
  });
  return h;
}

std::tuple<at::Tensor, at::Tensor> tree_scan_backward(
    const at::Tensor& grad_h,
    const at::Tensor& x,
    const at::Tensor& decay,
    const at::Tensor& parent,
    const at::Tensor& order,
    std::string_view propagation_name) {
  const Propagation propagation = parse_propagation(propagation_name);
  check_scan_inputs(x, decay, parent, order);
  check_scan_gradient(grad_h, x);
  const at::Tensor grad_rows = grad_h.contiguous(), x_rows = x.contiguous(), decay_rows = decay.contiguous();
  const at::Tensor parents = parent.contiguous(), orders = order.contiguous();
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  at::Tensor grad_decay = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) {
    return {grad_x, grad_decay};
  }
  check_trees(parents, orders);
  const int64_t channels = x.size(2), vertices = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "tree_scan_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* grads = grad_rows.const_data_ptr<scalar_t>();
    const scalar_t* xs = x_rows.const_data_ptr<scalar_t>();
    const scalar_t* decays = decay_rows.const_data_ptr<scalar_t>();
    scalar_t* grad_xs = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* grad_decays = grad_decay.mutable_data_ptr<scalar_t>();
    for_each_block<acc_t>(
        parents, orders, channels, 2, [&](auto kernels, auto known, Block block, Tree tree, acc_t* u) {
          decltype(kernels)::template scan_backward<decltype(known)::value>(
              grads + block.offset,
              xs + block.offset,
              decays + block.offset,
              grad_xs + block.offset,
              grad_decays + block.offset,
              channels,
              block.width,
              tree,
              propagation,
              u,
              u + vertices * block.width);
        });
  });
  return {grad_x, grad_decay};
}

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("tree_scan", &tree_scan);
  m.impl("tree_scan_backward", &tree_scan_backward);
}

}  // namespace grootvl::cpu
