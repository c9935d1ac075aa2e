// Runs CUDA kernels on the CPU: every thread of a block is a fiber that runs until it waits for others, one block after
// another. What a GPU leaves open (the order of blocks and threads, the contents of fresh shared memory) is drawn from
// a seed, the environment variable GROOTVL_EMULATION_SEED; 0 is ascending order. What CUDA leaves undefined (threads
// that wait for each other for ever, a warp function that names a lane which has ended) is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "vector_types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

// A place in the source, as default argument that of the call.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Runs body(arguments) once for each thread of the grid. A block has `shared_bytes` of dynamic shared memory; with its
// shared variables that must not be more than `shared_limit`. If the environment variable GROOTVL_EMULATION_LOG names a
// file, a line of JSON is added to it: what the launch was, and the steps of the block that took most, which are one
// more than its barriers.
void run(
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    size_t shared_limit,
    const char* signature,
    void (*body)(const void*),
    const void* arguments);

// What the votes of a block come to, once all its threads that have not ended are here.
struct Votes {
  unsigned count, voters;
};
Votes wait_for_block(bool vote, const char* function, Site site);

// Waits for the lanes of the mask and returns the value that lane `source` brought, or the votes of the lanes.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* function, Site site);
unsigned vote(unsigned mask, bool vote, const char* function, Site site);

// Lets other threads run first, now and then. Atomics call it.
void pause();

unsigned lane();

// Dynamic shared memory of this block.
extern void* dynamic_shared_memory;

// A number for each block that has been run.
extern uint64_t block_serial;

void* allocate_shared(size_t bytes);
void fill_with_garbage(void* memory, size_t bytes);

// Tells that this block has so much static shared memory more.
void count_shared_variable(size_t bytes);

// Bytes of all shared variables that are declared anywhere: what each kernel has at most.
inline size_t& bytes_of_shared_variables() {
  static size_t bytes = 0;
  return bytes;
}

// A declaration, told from others by file and line.
constexpr uint64_t place_of(const char* file, int line) {
  uint64_t hash = static_cast<uint64_t>(line);
  for (; *file != 0; ++file) {
    hash = hash * 1099511628211u + static_cast<unsigned char>(*file);
  }
  return hash;
}

// A variable in shared memory: garbage when a block first sees it.
template <typename T, uint64_t kPlace>
class SharedVariable {
  static_assert(std::is_trivially_default_constructible_v<T>, "CUDA does not construct shared variables");

 public:
  T& of_this_block() {
    (void)kDeclared;
    if (memory_ == nullptr) {
      memory_ = static_cast<T*>(allocate_shared(sizeof(T)));
    }
    if (serial_ != block_serial) {
      serial_ = block_serial;
      count_shared_variable(sizeof(T));
      fill_with_garbage(memory_, sizeof(T));
    }
    return *memory_;
  }

 private:
  inline static const size_t kDeclared = bytes_of_shared_variables() += sizeof(T);

  T* memory_ = nullptr;
  uint64_t serial_ = 0;
};

}  // namespace emulation
