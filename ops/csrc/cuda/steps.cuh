// Algorithms over the vertices of images in parallel steps: a step runs for every index and sees the results of the
// steps before it. A small image has one block, with barriers between steps; for large images, a step is a kernel over
// many blocks and all images.
//
// A Step is a class with static functions: run(arrays, i), or for prefix sums value(arrays, i), place(arrays, i, value,
// sum of the values before) and total(arrays, sum of all). A Batch gives the arrays of an image: batch[image].
#pragma once

#include "cuda/collectives.cuh"
#include "cuda/launch.cuh"

namespace grootvl::cuda {

constexpr int kThreadsOfMany = 256;

// The indices below `count` of each image, in one part per block: the grid is images x parts.
struct Parts {
  int count, size, parts;

  // A part has one index per thread, or more if an image would have more parts than one block can sum.
  static Parts of(int64_t count) {
    constexpr int64_t kMostParts = 4096;
    const int64_t threads = divide_up<int64_t>(divide_up<int64_t>(count, kMostParts), kThreadsOfMany) * kThreadsOfMany;
    return {static_cast<int>(count), static_cast<int>(threads), static_cast<int>(divide_up(count, threads))};
  }
  __device__ int64_t image() const {
    return blockIdx.x / parts;
  }
  __device__ int part() const {
    return static_cast<int>(blockIdx.x % parts);
  }
  __device__ int begin() const {
    return part() * size;
  }
  __device__ int end() const {
    return min(count, begin() + size);
  }
};

// Runs a step for every index of every image.
template <typename Step, typename Batch>
__global__ void __launch_bounds__(kThreadsOfMany) step_kernel(Batch batch, Parts parts) {
  const auto arrays = batch[parts.image()];
  for (int i = parts.begin() + static_cast<int>(threadIdx.x); i < parts.end(); i += blockDim.x) {
    Step::run(arrays, i);
  }
}

// number() over all indices of an image by several blocks, in two kernels. `sums` has an entry per block.
template <typename Step, typename Batch>
__global__ void __launch_bounds__(kThreadsOfMany) sum_parts_kernel(Batch batch, Parts parts, int* sums) {
  const auto arrays = batch[parts.image()];
  int own = 0;
  for (int i = parts.begin() + static_cast<int>(threadIdx.x); i < parts.end(); i += blockDim.x) {
    own += Step::value(arrays, i);
  }
  int total = 0;
  exclusive_sum(own, total);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = total;
  }
}

template <typename Step, typename Batch>
__global__ void __launch_bounds__(kThreadsOfMany) number_parts_kernel(Batch batch, Parts parts, const int* sums) {
  const auto arrays = batch[parts.image()];
  const int* const of_image = sums + parts.image() * parts.parts;
  int own = 0;
  for (int part = threadIdx.x; part < parts.part(); part += blockDim.x) {
    own += of_image[part];
  }
  int before = 0;
  exclusive_sum(own, before);
  const int sum = number(
      parts.begin(),
      parts.end(),
      before,
      [&](int i) { return Step::value(arrays, i); },
      [&](int i, int value, int sum_before) { Step::place(arrays, i, value, sum_before); });
  if (parts.part() == parts.parts - 1 && threadIdx.x == 0) {
    Step::total(arrays, sum);
  }
}

template <typename Step, typename Batch>
void launch_step(const Batch& batch, int64_t images, int64_t count) {
  const Parts parts = Parts::of(count);
  launch(step_kernel<Step, Batch>, blocks_in_row(images * parts.parts), kThreadsOfMany, 0, batch, parts);
}

// Launches both kernels of number().
template <typename Step, typename Batch>
void launch_number(const Batch& batch, int64_t images, int64_t count, int* sums) {
  const Parts parts = Parts::of(count);
  const dim3 grid = blocks_in_row(images * parts.parts);
  launch(sum_parts_kernel<Step, Batch>, grid, kThreadsOfMany, 0, batch, parts, sums);
  launch(number_parts_kernel<Step, Batch>, grid, kThreadsOfMany, 0, batch, parts, sums);
}

// Runs a step, or number(), for one image by one block.
template <typename Step, typename Arrays>
__device__ void step_in_block(const Arrays& arrays, int count) {
  for_each_index(count, [&](int i) { Step::run(arrays, i); });
  __syncthreads();
}

template <typename Step, typename Arrays>
__device__ void number_in_block(const Arrays& arrays, int count) {
  const int sum = number(
      0,
      count,
      0,
      [&](int i) { return Step::value(arrays, i); },
      [&](int i, int value, int before) { Step::place(arrays, i, value, before); });
  if (threadIdx.x == 0) {
    Step::total(arrays, sum);
  }
  __syncthreads();
}

}  // namespace grootvl::cuda
