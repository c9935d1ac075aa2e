// Sums over the threads of a warp or of a block.
#pragma once

#include "cuda/launch.cuh"

namespace grootvl::cuda {

constexpr unsigned kAllLanes = 0xffffffff;

// The sum over kLanes neighbouring lanes of a warp, the same in each of them.
template <int kLanes, typename T>
__device__ T sum_over_lanes(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// The sum of `value` over the threads before this one; `total` is that over all threads. Called by the whole block.
__device__ inline int exclusive_sum(int value, int& total) {
  __shared__ int of_warps[kWarpSize];
  const int lane = lane_index(), warp = warp_index();
  int inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, inclusive, offset);
    if (lane >= offset) {
      inclusive += before;
    }
  }
  if (lane == kWarpSize - 1) {
    of_warps[warp] = inclusive;
  }
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < warps_in_block(); ++w) {
    before += w < warp ? of_warps[w] : 0;
    total += of_warps[w];
  }
  // The next call must not overwrite the sums before all threads have read them.
  __syncthreads();
  return before + inclusive - value;
}

// Calls `visit` with every index below count, spread over the threads of the block.
template <typename Visit>
__device__ void for_each_index(int count, const Visit& visit) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    visit(i);
  }
}

// An exclusive sum of `value` over the indices begin..end-1 that starts with `before`: calls place(i, value, sum) for
// each index and returns the total. Called by the whole block; ends with a barrier.
template <typename Value, typename Place>
__device__ int number(int begin, int end, int before, const Value& value, const Place& place) {
  for (int first = begin; first < end; first += blockDim.x) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int own = i < end ? value(i) : 0;
    int total = 0;
    const int sum = before + exclusive_sum(own, total);
    if (i < end) {
      place(i, own, sum);
    }
    before += total;
  }
  __syncthreads();
  return before;
}

}  // namespace grootvl::cuda
