// Relaxed accesses to memory that other threads write concurrently: atomic, but without any ordering. Where order
// matters, a barrier or the end of a kernel provides it.
#pragma once

#include <cuda/atomic>

namespace grootvl::cuda {

template <typename T>
__device__ T load_relaxed(const T* address) {
  return ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*const_cast<T*>(address))
      .load(::cuda::std::memory_order_relaxed);
}

template <typename T>
__device__ void store_relaxed(T* address, T value) {
  ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*address).store(value, ::cuda::std::memory_order_relaxed);
}

}  // namespace grootvl::cuda
