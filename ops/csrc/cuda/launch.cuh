// Kernel launches, and thread indices inside kernels.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

namespace grootvl::cuda {

constexpr int kWarpSize = 32;

// A kernel's dynamic shared memory; its launch sets the size.
extern __shared__ __align__(16) unsigned char shared_memory[];

template <typename T>
__device__ T* shared_memory_as() {
  return reinterpret_cast<T*>(shared_memory);
}

__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

__device__ inline int warps_in_block() {
  return static_cast<int>(blockDim.x) / kWarpSize;
}

template <typename T>
constexpr __host__ __device__ T divide_up(T count, T by) {
  return (count + by - 1) / by;
}

// The smallest n with base^n >= count; base >= 2.
constexpr int log_up(int64_t count, int64_t base = 2) {
  int n = 0;
  for (int64_t power = 1; power < count; power *= base) {
    ++n;
  }
  return n;
}

// A one-dimensional grid of blocks.
inline dim3 blocks_in_row(int64_t count) {
  TORCH_CHECK_VALUE(
      count <= std::numeric_limits<int>::max(), "the inputs are too large for one call: ", count, " blocks of threads");
  return dim3(static_cast<unsigned>(count));
}

// The most bytes of shared memory that a block can have on the current device, static and dynamic together.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// The most bytes of dynamic shared memory that a launch of the kernel can request on the current device. The first call
// for a kernel and device opts in to all of it. Since the opt-in belongs to the kernel, setting it to the needs of one
// launch could fail a launch in another thread. The limit without opt-in varies: it includes static shared memory.
template <typename... Parameters>
int64_t dynamic_shared_memory_limit(void (*kernel)(Parameters...)) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Parameters...), int>, int64_t> limits;
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = limits.find({kernel, device});
  if (found != limits.end()) {
    return found->second;
  }
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  const int64_t limit = shared_memory_limit() - static_cast<int64_t>(attributes.sharedSizeBytes);
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)));
  limits[{kernel, device}] = limit;
  return limit;
}

// Launches a kernel on the current stream of the current device.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, Arguments&&... arguments) {
  if (shared_bytes > 0) {
    const int64_t limit = dynamic_shared_memory_limit(kernel);
    TORCH_CHECK(
        shared_bytes <= limit,
        "a block of this operator takes ",
        shared_bytes,
        " bytes of shared memory, the device has ",
        limit);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace grootvl::cuda
