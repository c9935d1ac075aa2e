// Replaces CUDA's header of this name: the host functions that the operators use. Memory is host memory, and launches
// are synchronous.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "device_language.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulation {

// Static and dynamic shared memory of a block without opting in to more.
constexpr size_t kSharedBytes = 48 * 1024;

// The limit with opt-in: that of compute capability 9.0, unless the environment variable sets that of another card.
inline size_t shared_bytes_of_card() {
  const char* text = std::getenv("GROOTVL_EMULATION_SHARED_BYTES");
  return text == nullptr ? 232448 : std::strtoull(text, nullptr, 10);
}

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

inline std::mutex limits_mutex;

// The dynamic shared memory that a kernel has opted in to.
inline std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

// The limit for a launch of the kernel; without opt-in, it includes static shared memory.
inline size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const auto found = shared_limits().find(kernel);
  return found == shared_limits().end() ? kSharedBytes : found->second;
}

inline bool has_asked(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  return shared_limits().count(kernel) != 0;
}

// Rejects launches that a GPU of compute capability 9.0 would reject.
inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool empty = grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
  if (empty || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || block.x > kMaxThreads ||
      block.y > kMaxThreads || block.z > 64 || uint64_t{block.x} * block.y * block.z > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  return config.dynamicSmemBytes > shared_limit(kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid argument";
  }
}

inline cudaError_t cudaPeekAtLastError() {
  return emulation::last_error;
}

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::last_error, cudaSuccess);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const cudaError_t error = emulation::check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) {
    return emulation::report(error);
  }
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto body = [](const void* of) {
    const Call& call = *static_cast<const Call*>(of);
    std::apply(call.first, call.second);
  };
  const auto* const address = reinterpret_cast<const void*>(kernel);
  const size_t limit = emulation::has_asked(address) ? emulation::shared_bytes_of_card() : emulation::kSharedBytes;
  emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, limit, __PRETTY_FUNCTION__, body, &call);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const std::lock_guard<std::mutex> lock(emulation::limits_mutex);
    const auto bytes = static_cast<size_t>(value);
    auto& limits = emulation::shared_limits();
    const auto found = limits.find(reinterpret_cast<const void*>(kernel));
    // A GPU permits this, but another thread may be about to launch the kernel with the previous limit.
    const bool takes_away = found != limits.end() && bytes < found->second;
    if (value < 0 || bytes > emulation::shared_bytes_of_card() || takes_away) {
      return emulation::report(cudaErrorInvalidValue);
    }
    limits[reinterpret_cast<const void*>(kernel)] = bytes;
  }
  return cudaSuccess;
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

// The shared variables of a kernel are only known when it runs, so this counts all of them.
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->sharedSizeBytes = emulation::bytes_of_shared_variables();
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : static_cast<int>(emulation::shared_bytes_of_card());
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) {
    std::memset(memory, value, bytes);
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) {
    std::memcpy(to, from, bytes);
  }
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
