// Stands in for PyTorch's header of this name.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(EXPR)                                                                      \
  do {                                                                                            \
    const cudaError_t error_of_call = EXPR;                                                       \
    TORCH_CHECK(error_of_call == cudaSuccess, "CUDA error: ", cudaGetErrorString(error_of_call)); \
  } while (0)

#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
