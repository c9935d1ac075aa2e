// Cuts trees into pieces: by one block for a tree that fits into its shared memory, by many blocks for larger trees.
#include "cuda/pieces.cuh"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "cuda/cut.cuh"
#include "cuda/steps.cuh"

namespace grootvl::cuda {
namespace {
constexpr int kThreads = 1024;

// ---- one block per tree ----

__global__ void __launch_bounds__(kThreads) cut_kernel(Cuts cuts) {
  cut_in_block(cuts.of(blockIdx.x, shared_memory_as<int>()));
}

// ---- many blocks per tree ----

__global__ void __launch_bounds__(kThreads) arrange_kernel(Cuts cuts) {
  arrange_pieces(cuts[blockIdx.x]);
}

__global__ void __launch_bounds__(kThreadsOfMany) order_kernel(Cuts cuts) {
  const Cut cut = cuts[blockIdx.x];
  const int count = cut.out_pieces(), stride = gridDim.y * warps_in_block();
  for (int piece = blockIdx.y * warps_in_block() + warp_index(); piece < count; piece += stride) {
    order_members(cut, piece);
  }
}

void cut_large_trees(Cuts cuts, int64_t batch, const at::TensorOptions& options) {
  const int64_t vertices = cuts.pieces.vertices;
  const at::Tensor workspace = at::empty({batch * Cut::kArrays * vertices}, options);
  const at::Tensor sums = at::empty({batch * Parts::of(vertices).parts}, options);
  int* const of_parts = sums.mutable_data_ptr<int>();
  cuts.workspace = workspace.mutable_data_ptr<int>();
  launch_step<FindPositions>(cuts, batch, vertices);
  launch_step<FindParents>(cuts, batch, vertices);
  for (const int rounds = log_up(vertices); cuts.round != rounds; ++cuts.round) {
    launch_step<CountSubtrees>(cuts, batch, vertices);
  }
  launch_step<CompareChildren>(cuts, batch, vertices);
  launch_number<NumberCriticals>(cuts, batch, vertices, of_parts);
  launch_step<StartHeads>(cuts, batch, vertices);
  for (int step = 1; step < kHeadSteps; ++step) {
    launch_step<FindHeads>(cuts, batch, vertices);
  }
  launch_step<CountMembers>(cuts, batch, vertices);
  launch_number<ListHeads>(cuts, batch, vertices, of_parts);
  const dim3 images = blocks_in_row(batch);
  launch(arrange_kernel, images, kThreads, 0, cuts);
  launch_step<CollectMembers>(cuts, batch, vertices);
  const int64_t warps = kThreadsOfMany / kWarpSize;
  const int64_t blocks = std::min<int64_t>(divide_up(cuts.pieces.usual_pieces(), warps), 65535);
  launch(order_kernel, dim3(images.x, static_cast<unsigned>(blocks)), kThreadsOfMany, 0, cuts);
}

// About the square root of the number of vertices, which balances the time for the pieces and for the tree of critical
// vertices.
int choose_size(int64_t vertices) {
  int size = 16;
  while (size < kMostMembers - 1 && static_cast<int64_t>(size) * size * 2 < vertices) {
    size *= 2;
  }
  return size;
}

PieceTensors pieces_in(const at::Tensor& memory, int64_t vertices) {
  const int size = choose_size(vertices);
  const int64_t most_criticals = 2 * divide_up<int64_t>(vertices, size);
  return {memory, {static_cast<int>(vertices), size + 1, static_cast<int>(most_criticals), memory.data_ptr<int>()}};
}

}  // namespace

PieceTensors allocate_pieces(int64_t batch, int64_t vertices, const at::TensorOptions& options) {
  TORCH_CHECK_VALUE(vertices < int64_t{1} << 28, "trees must have less than 2^28 vertices, got ", vertices);
  return pieces_in(at::empty({batch, Pieces::entries(vertices)}, options.dtype(at::kInt)), vertices);
}

PieceTensors cut_trees(const at::Tensor& parent, const at::Tensor& order, const OptionalTensor& cut) {
  const int64_t batch = parent.size(0), vertices = parent.size(1);
  if (cut.has_value()) {
    const std::array<int64_t, 2> shape{batch, Pieces::entries(vertices)};
    TORCH_CHECK_VALUE(
        cut->sizes() == at::IntArrayRef(shape) && cut->scalar_type() == at::kInt && cut->device() == parent.device() &&
            cut->is_contiguous(),
        "cut must be what tree_cut returns for parent and order, ",
        at::IntArrayRef(shape),
        " int32, got ",
        cut->sizes(),
        ' ',
        cut->scalar_type());
    return pieces_in(*cut, vertices);
  }
  const PieceTensors result = allocate_pieces(batch, vertices, parent.options());
  const at::Tensor parents = parent.contiguous(), orders = order.contiguous();
  const Cuts cuts{result.pieces, orders.const_data_ptr<int>(), parents.const_data_ptr<int>()};
  const int64_t bytes = Cut::kArrays * vertices * static_cast<int64_t>(sizeof(int));
  if (bytes > dynamic_shared_memory_limit(cut_kernel)) {
    cut_large_trees(cuts, batch, parent.options());
    return result;
  }
  launch(
      cut_kernel,
      blocks_in_row(batch),
      static_cast<int>(std::min<int64_t>(kThreads, divide_up<int64_t>(vertices, kWarpSize) * kWarpSize)),
      bytes,
      cuts);
  return result;
}

at::Tensor tree_cut(const at::Tensor& parent, const at::Tensor& order) {
  for (const at::Tensor& vertices : {parent, order}) {
    TORCH_CHECK_TYPE(
        vertices.scalar_type() == at::kInt, "parent and order must be int32, got ", vertices.scalar_type());
    TORCH_CHECK_VALUE(
        vertices.dim() == 2 && vertices.sizes() == parent.sizes() && vertices.device() == parent.device(),
        "parent and order must have the same shape (B, L) and device, got ",
        parent.sizes(),
        " and ",
        order.sizes());
  }
  const c10::cuda::CUDAGuard guard(parent.device());
  if (parent.numel() == 0) {
    return at::empty({parent.size(0), Pieces::entries(parent.size(1))}, parent.options());
  }
  return cut_trees(parent, order, c10::nullopt).memory;
}

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("tree_cut", &tree_cut);
}

}  // namespace grootvl::cuda
