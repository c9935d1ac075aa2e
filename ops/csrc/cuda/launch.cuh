// How kernels are launched, and the indices inside of them.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace grootvl::cuda {

constexpr int kWarpSize = 32;

// A kernel's dynamic shared memory, as large as its launch says.
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

// Bytes of shared memory that a block may have on the current device.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Warps for a block whose warps share nothing: as many as have room, at most `most` and at least one.
inline int warps_that_fit(int64_t bytes_a_warp, int most) {
  const int64_t room = bytes_a_warp == 0 ? most : shared_memory_limit() / bytes_a_warp;
  TORCH_CHECK(room > 0, "a row of this operator takes ", bytes_a_warp, " bytes, more than the device's shared memory");
  return static_cast<int>(room < most ? room : most);
}

// Queues a kernel on the current stream of the current device.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, Arguments&&... arguments) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace grootvl::cuda
