// Small kernels that use each part of the emulator, and some that are wrong on purpose.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace {

__global__ void reverse_in_dynamic_memory(const int* from, int* to) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  int* values = reinterpret_cast<int*>(shared_memory);
  values[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// A sum over the block by a tree of barriers.
__global__ void sum_of_block(const int* from, int* to) {
  __shared__ int partial[1024];
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  partial[thread] = from[thread];
  for (unsigned stride = threads / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (thread < stride) {
      partial[thread] += partial[thread + stride];
    }
  }
  if (thread == 0) {
    to[blockIdx.x] = partial[0];
  }
}

__global__ void votes_of_block(const int* from, int* to) {
  const int value = from[threadIdx.x];
  const int count = __syncthreads_count(value);
  const int any = __syncthreads_or(value);
  const int all = __syncthreads_and(value);
  if (threadIdx.x == 0) {
    to[0] = count;
    to[1] = any;
    to[2] = all;
  }
}

// Eight results for each lane.
__global__ void warp_functions(const int* from, int* to) {
  const unsigned all = 0xffffffff;
  const int value = from[threadIdx.x];
  int* results = to + 8 * threadIdx.x;
  results[0] = __shfl_sync(all, value, 5);
  results[1] = __shfl_up_sync(all, value, 3);
  results[2] = __shfl_down_sync(all, value, 3);
  results[3] = __shfl_xor_sync(all, value, 6);
  results[4] = static_cast<int>(__ballot_sync(all, value & 1));
  results[5] = 2 * __any_sync(all, value > 1000) + __all_sync(all, value >= 0);
  results[6] = __shfl_up_sync(all, value, 1, 8);
  // Halves of the warp that know nothing of each other.
  if (threadIdx.x % 32 < 16) {
    results[7] = static_cast<int>(1000 * __shfl_xor_sync(0x0000ffff, static_cast<double>(value), 1));
  } else {
    __syncwarp(0xffff0000);
    results[7] = static_cast<int>(__shfl_xor_sync(0xffff0000, static_cast<long long>(value), 1) << 1);
  }
}

__global__ void atomics(int* to) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(to, thread);
  atomicMin(to + 1, thread);
  atomicMax(to + 2, thread);
  atomicOr(to + 3, 1 << threadIdx.x % 32);
  atomicAnd(to + 4, ~(1 << threadIdx.x % 8));
  // An increment by hand. A plain read would race with the atomics; any guess will do.
  int seen = 0;
  for (int expected = ~seen; expected != seen;) {
    expected = seen;
    seen = atomicCAS(to + 5, expected, expected + 1);
  }
  atomicExch(to + 6, 7);
}

__global__ void index_of_thread(int* to) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  to[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(1000 * block + thread);
}

__global__ void order_of_threads(int* to) {
  const int turn = atomicAdd(to, 1);
  to[1 + turn] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void leave_early(int* to) {
  if (threadIdx.x % 2 == 1) {
    return;
  }
  to[threadIdx.x] = __syncthreads_count(1);
}

// Wrong: reads what another thread has perhaps not written yet.
__global__ void race(int* to) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  to[threadIdx.x] = threadIdx.x == 0 ? 0 : values[threadIdx.x - 1];
}

// Wrong: exchanges order no accesses to memory; with a barrier of the warp it is right.
template <bool kHasBarrier>
__device__ void read_neighbour(int* to) {
  __shared__ int values[32];
  values[threadIdx.x] = __shfl_xor_sync(0xffffffff, static_cast<int>(threadIdx.x), 1);
  __shfl_sync(0xffffffff, 0, 0);
  if (kHasBarrier) {
    __syncwarp();
  }
  to[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void race_over_a_shuffle(int* to) {
  read_neighbour<false>(to);
}

__global__ void barrier_of_a_warp(int* to) {
  read_neighbour<true>(to);
}

// Wrong: two blocks write to one place.
__global__ void race_between_blocks(int* to) {
  to[threadIdx.x] = static_cast<int>(blockIdx.x);
}

// Copies past the registers, in two batches; `waits` for them or reads what is there before.
__global__ void copies(const int* from, int* to, int waits) {
  __shared__ int4 values[32][2];
  __pipeline_memcpy_async(&values[threadIdx.x][0], from + 4 * threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_memcpy_async(&values[threadIdx.x][1], from + 4 * (31 - threadIdx.x), 16);
  __pipeline_commit();
  __pipeline_wait_prior(waits > 0 ? 1 : 2);
  to[2 * threadIdx.x] = values[threadIdx.x][0].w;
  if (waits != 1) {
    __pipeline_wait_prior(0);
  }
  to[2 * threadIdx.x + 1] = values[threadIdx.x][1].w;
}

__global__ void misaligned_copy(const int* from, int* to) {
  __shared__ int4 value;
  __pipeline_memcpy_async(&value, from + 1, 16);
  to[0] = value.x;
}

// Wrong: adds without an atomic.
__global__ void lost_update(int* to) {
  const int seen = to[0];
  atomicAdd(to + 1, 1);
  to[0] = seen + 1;
}

// Wrong: uses shared memory that nobody has written.
__global__ void uninitialised(int* to) {
  extern __shared__ float dynamic_values[];
  __shared__ float values[2][4];
  to[0] = isnan(dynamic_values[3]);
  to[1] = isnan(values[1][2]);
  values[1][2] = 0;
  dynamic_values[3] = 0;
}

// Wrong: some threads wait for a barrier, the others for them.
__global__ void barrier_and_shuffle(int* to) {
  if (threadIdx.x < 31) {
    __syncthreads();
  } else {
    to[0] = __shfl_sync(0xffffffff, 1, 0);
  }
}

// Wrong: a barrier in each branch.
__global__ void two_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Wrong: lane 3 is gone.
__global__ void shuffle_with_the_dead(int* to) {
  if (threadIdx.x == 3) {
    return;
  }
  to[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
}

// Wrong: lane 9 is not in the mask.
__global__ void shuffle_from_outside(int* to) {
  if (threadIdx.x < 8) {
    to[threadIdx.x] = __shfl_sync(0xff, 1, 9);
  }
}

// Wrong by one element: in global, dynamic and static shared memory.
__global__ void write_outside(int* to, int where, int length) {
  extern __shared__ int dynamic_values[];
  __shared__ int values[8];
  (where == 0 ? to : where == 1 ? dynamic_values : values)[length] = 1;
}

// Wrong: signed overflow, and a vector that is not aligned.
__global__ void undefined(int* to, int largest) {
  to[0] = largest + 1;
}

__global__ void misaligned(int* to) {
  *reinterpret_cast<int4*>(to + 1) = make_int4(1, 2, 3, 4);
}

__global__ void throwing(int*) {
  __syncthreads();
  if (threadIdx.x == 7) {
    throw std::out_of_range("thread 7");
  }
  __syncthreads();
}

__global__ void many_barriers(int* to, int count) {
  for (int i = 0; i < count; ++i) {
    __syncthreads();
  }
  to[threadIdx.x] = count;
}

struct Shape {
  int grid[3], block[3];
  int shared_bytes;
};

dim3 as_dim3(const int (&extents)[3]) {
  return dim3(extents[0], extents[1], extents[2]);
}

std::string message;

template <typename... Parameters, typename... Arguments>
const char* launch(const Shape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  message.clear();
  cudaLaunchConfig_t config = {};
  config.gridDim = as_dim3(shape.grid);
  config.blockDim = as_dim3(shape.block);
  config.dynamicSmemBytes = shape.shared_bytes;
  try {
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) {
      message = std::string(cudaGetErrorString(error)) + ", " + cudaGetErrorString(cudaGetLastError());
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#define TOY(name)                                                           \
  extern "C" __attribute__((visibility("default"))) const char* run_##name( \
      const Shape* shape, [[maybe_unused]] const int* from, int* to, [[maybe_unused]] int a, [[maybe_unused]] int b)

#define TOY_FROM_TO(name)                  \
  TOY(name) {                              \
    return launch(*shape, name, from, to); \
  }

#define TOY_TO(name)                 \
  TOY(name) {                        \
    return launch(*shape, name, to); \
  }

TOY_FROM_TO(reverse_in_dynamic_memory)
TOY_FROM_TO(sum_of_block)
TOY_FROM_TO(votes_of_block)
TOY_FROM_TO(warp_functions)
TOY_TO(atomics)
TOY_TO(index_of_thread)
TOY_TO(order_of_threads)
TOY_TO(leave_early)
TOY_TO(race)
TOY_TO(race_over_a_shuffle)
TOY_TO(barrier_of_a_warp)
TOY_TO(lost_update)
TOY_TO(uninitialised)
TOY_TO(barrier_and_shuffle)
TOY_TO(two_barriers)
TOY_TO(shuffle_with_the_dead)
TOY_TO(shuffle_from_outside)
TOY_TO(misaligned)
TOY_TO(throwing)

TOY(write_outside) {
  return launch(*shape, write_outside, to, a, b);
}

TOY(undefined) {
  return launch(*shape, undefined, to, a);
}

TOY(race_between_blocks) {
  Shape two_blocks = *shape;
  two_blocks.grid[0] = 2;
  return launch(two_blocks, race_between_blocks, to);
}

TOY(copies) {
  return launch(*shape, copies, from, to, a);
}

TOY_FROM_TO(misaligned_copy)

TOY(many_barriers) {
  return launch(*shape, many_barriers, to, a);
}

const char* allow(const void* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess
             ? ""
             : cudaGetErrorString(cudaGetLastError());
}

TOY(allow_shared_memory) {
  return allow(reinterpret_cast<const void*>(reverse_in_dynamic_memory), a);
}

TOY(allow_sum_of_block) {
  return allow(reinterpret_cast<const void*>(sum_of_block), a);
}
