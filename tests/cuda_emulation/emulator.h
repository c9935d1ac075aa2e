// Runs CUDA kernels on the CPU: every thread of a block is a fiber that runs until it waits for others, one block after
// another. Unspecified behaviour of a GPU (the order of blocks and threads, the initial contents of shared memory) is
// random, with the seed in the environment variable GROOTVL_EMULATION_SEED; 0 is ascending order. Undefined behaviour
// in CUDA (deadlocks, warp functions whose mask includes a lane that has exited) is an error.
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

// A source location; as a default argument, that of the call.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Runs body(arguments) once for each thread of the grid. A block has `shared_bytes` of dynamic shared memory; with its
// shared variables that must not be more than `shared_limit`. If the environment variable GROOTVL_EMULATION_LOG names a
// file, each launch appends a line of JSON to it: the launch parameters, and the largest number of steps of a block,
// which is one more than its barriers.
void run(
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    size_t shared_limit,
    const char* signature,
    void (*body)(const void*),
    const void* arguments);

// The result of a block's vote, after all of its threads that have not exited have arrived.
struct Votes {
  unsigned count, voters;
};
Votes wait_for_block(bool vote, const char* function, Site site);

// The function that orders the memory accesses of a warp's lanes.
inline constexpr char kSyncWarp[] = "__syncwarp";

// Waits for the lanes of the mask and returns the value passed by lane `source`, or the votes of the lanes.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* function, Site site);
unsigned vote(unsigned mask, bool vote, const char* function, Site site);

// Randomly lets other threads run first. Called by atomics.
void pause();

// Asynchronous copies of a thread, in batches. They are performed when the thread waits for them; until then, their
// destination contains garbage. A thread waits for all batches except a number of the latest ones.
void copy_later(void* to, const void* from, size_t bytes, const char* function, Site site);
void commit_copies();
void wait_for_copies(size_t batches);

unsigned lane();

// Dynamic shared memory of this block.
extern void* dynamic_shared_memory;

// A unique number for each block that has been run.
extern uint64_t block_serial;

// The index of the running block's place. For the thread sanitizer, several blocks of a grid have separate threads and
// memory (places), so that it can distinguish them; the other blocks reuse the place of an earlier block.
#ifdef EMULATED_THREADS_ARE_WATCHED
constexpr unsigned kMostPlaces = 16;
#else
constexpr unsigned kMostPlaces = 1;
#endif
extern unsigned block_place;

void* allocate_shared(size_t bytes);
void fill_with_garbage(void* memory, size_t bytes);

// Adds to the static shared memory that this block uses.
void count_shared_variable(size_t bytes);

// The total bytes of all declared shared variables, an upper bound for each kernel.
inline size_t& bytes_of_shared_variables() {
  static size_t bytes = 0;
  return bytes;
}

// A declaration, identified by file and line.
constexpr uint64_t place_of(const char* file, int line) {
  uint64_t hash = static_cast<uint64_t>(line);
  for (; *file != 0; ++file) {
    hash = hash * 1099511628211u + static_cast<unsigned char>(*file);
  }
  return hash;
}

// A variable in shared memory, which contains garbage when a block starts.
template <typename T, uint64_t kPlace>
class SharedVariable {
  static_assert(std::is_trivially_default_constructible_v<T>, "CUDA does not construct shared variables");

 public:
  __attribute__((no_sanitize_thread)) T& of_this_block() {
    (void)kDeclared;
    T*& memory = memory_[block_place];
    if (memory == nullptr) {
      memory = static_cast<T*>(allocate_shared(sizeof(T)));
    }
    if (serial_ != block_serial) {
      serial_ = block_serial;
      count_shared_variable(sizeof(T));
      fill_with_garbage(memory, sizeof(T));
    }
    return *memory;
  }

 private:
  inline static const size_t kDeclared = bytes_of_shared_variables() += sizeof(T);

  T* memory_[kMostPlaces] = {};
  uint64_t serial_ = 0;
};

}  // namespace emulation
