// Memory that threads read while others write it. Relaxed: each access is whole, and nothing else is promised. What
// must be seen in some order is separated by a barrier or by the end of a kernel.
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
