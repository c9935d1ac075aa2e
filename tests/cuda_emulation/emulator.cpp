#include "emulator.h"

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <mutex>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATED_THREADS_ARE_WATCHED
#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

uint64_t block_serial = 0;
unsigned block_place = 0;
void* dynamic_shared_memory = nullptr;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// A separate stack, and the state with which to resume it. Without a stack: the caller.
struct Fiber {
  jmp_buf registers;
  bool started = false;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  // The corresponding thread of the thread sanitizer.
  void* watched = nullptr;
};

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kEnded };

// A pending asynchronous copy, and its batch.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, batch;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number;
  State state;
  // The location where it waits.
  const char* function;
  Site site;
  unsigned mask;
  // The result of the last wait.
  uint64_t result;
  std::vector<Copy> copies;
  size_t batches;
};

// Lanes that wait for each other in a warp function.
struct Group {
  unsigned mask, arrived, ballot;
  bool is_vote;
  const char* function;
  Site site;
  uint64_t values[kWarpSize];
  uint8_t sources[kWarpSize];
};

struct Warp {
  unsigned ended;
  std::vector<Group> groups;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d) {
    next();
  }

  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
  }

  uint32_t below(uint32_t bound) {
    return static_cast<uint32_t>(uint64_t{next()} * bound >> 32);
  }

  template <typename T>
  void shuffle(T* first, size_t count) {
    for (size_t i = count; i > 1; --i) {
      std::swap(first[i - 1], first[below(i)]);
    }
  }

 private:
  uint64_t state_;
};

// A first-in, first-out queue of threads that can run. Contains each thread at most once.
class Queue {
 public:
  bool empty() const {
    return size_ == 0;
  }

  void clear() {
    size_ = 0;
  }

  void push_back(uint16_t number) {
    numbers_[(first_ + size_++) % kMaxThreads] = number;
  }

  void push_front(uint16_t number) {
    first_ = (first_ + kMaxThreads - 1) % kMaxThreads;
    numbers_[first_] = number;
    ++size_;
  }

  uint16_t pop() {
    const uint16_t number = numbers_[first_];
    first_ = (first_ + 1) % kMaxThreads;
    --size_;
    return number;
  }

 private:
  uint16_t numbers_[kMaxThreads];
  unsigned first_ = 0, size_ = 0;
};

std::mutex one_grid_at_a_time;
uint64_t grids = 0;

Fiber caller;
// The threads of all places, and those of this block.
Thread all_threads[kMaxThreads * (kMostPlaces > 1 ? 4 : 1)];
Thread* threads = all_threads;
Warp warps[kMaxThreads / kWarpSize];
Thread* current = nullptr;
Queue ready;
unsigned num_threads, alive, at_barrier;
// The first thread that waits at the block's barrier.
const Thread* barrier;
Votes votes, last_votes;
bool shuffled;
Random chance{0};
std::exception_ptr error;
void (*kernel)(const void*);
const void* kernel_arguments;
size_t dynamic_bytes, static_bytes, most_shared_bytes;
// The steps of the running block, which its barriers separate.
uint64_t steps;
// Of the running grid: the most copies that a thread had started when it waited, and the bytes of all copies.
uint64_t most_copies, copied_bytes;

std::ostream& operator<<(std::ostream& out, const uint3& index) {
  return out << '(' << index.x << ", " << index.y << ", " << index.z << ')';
}

std::ostream& operator<<(std::ostream& out, const Site& site) {
  return out << site.file << ':' << site.line;
}

bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Synchronization for the thread sanitizer: a thread releases its memory accesses at an address, and another thread
// acquires them there.
void switch_watched([[maybe_unused]] const Fiber& to) {
#ifdef EMULATED_THREADS_ARE_WATCHED
  __tsan_switch_to_fiber(to.watched, __tsan_switch_to_fiber_no_sync);
#endif
}

void leave_work([[maybe_unused]] void* at) {
#ifdef EMULATED_THREADS_ARE_WATCHED
  __tsan_release(at);
#endif
}

void take_over_work([[maybe_unused]] void* at) {
#ifdef EMULATED_THREADS_ARE_WATCHED
  __tsan_acquire(at);
#endif
}

// Addresses for release and acquire: the start and end of a grid, the barriers of the block in each place, and each
// warp.
char work_of_grid[2], work_of_barriers[kMostPlaces], work_of_warps[kMostPlaces][kMaxThreads / kWarpSize];
// Likewise the end of a block, for the next block in its place. The two alternate, since a thread that begins must not
// acquire the accesses of threads of its own block that have ended.
char work_of_blocks[kMostPlaces][2];
unsigned block_turn = 0;

// Each of these threads acquires the accesses of all of them.
[[maybe_unused]] void share_work(const uint16_t* numbers, unsigned count, void* at) {
  if (kMostPlaces == 1) {
    return;
  }
  for (unsigned i = 0; i < count; ++i) {
    switch_watched(threads[numbers[i]].fiber);
    leave_work(at);
  }
  for (unsigned i = 0; i < count; ++i) {
    switch_watched(threads[numbers[i]].fiber);
    take_over_work(at);
  }
  switch_watched(current->fiber);
}

void announce_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] const Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
}

void complete_switch([[maybe_unused]] Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t stack_bytes;
  __sanitizer_finish_switch_fiber(to.fake_stack, &stack, &stack_bytes);
  // The first switch comes from the caller, whose stack is only known here.
  if (caller.stack == nullptr) {
    caller.stack = static_cast<char*>(const_cast<void*>(stack));
    caller.stack_bytes = stack_bytes;
  }
#endif
}

void live();

void start(Fiber& fiber, unsigned number) {
  if (fiber.stack == nullptr) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    fiber.stack = static_cast<char*>(memory);
    // Different offsets within a page; otherwise all stacks would compete for a few cache lines.
    fiber.stack_bytes = kStackBytes - number % 64 * 192;
#ifdef EMULATED_THREADS_ARE_WATCHED
    fiber.watched = __tsan_create_fiber(0);
#endif
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
  fiber.fake_stack = nullptr;
}

// Resumes another fiber; returns when this one is resumed.
__attribute__((noinline)) void go_on(Fiber& from, Fiber& to) {
  announce_switch(from, to);
  // Saving and restoring registers takes nanoseconds, swapcontext two system calls, so the latter only starts fibers.
  if (_setjmp(from.registers) == 0) {
    switch_watched(to);
    if (to.started) {
      _longjmp(to.registers, 1);
    }
    to.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = to.stack;
    context.uc_stack.ss_size = to.stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, live, 0);
    setcontext(&context);
  }
  complete_switch(from);
}

[[noreturn]] void give_up(std::exception_ptr reason) {
  error = std::move(reason);
  Thread* last = current;
  current = nullptr;
  go_on(last->fiber, caller);
  std::abort();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::exception_ptr reason;
  {
    std::ostringstream text;
    text << "CUDA emulation: block " << blockIdx << ", ";
    (text << ... << parts);
    reason = std::make_exception_ptr(std::runtime_error(text.str()));
  }
  give_up(std::move(reason));
}

// No thread can run: reports which threads wait where.
[[noreturn]] void fail_by_deadlock() {
  std::ostringstream text;
  std::vector<bool> told(num_threads, false);
  for (unsigned i = 0; i < num_threads; ++i) {
    const Thread& first = threads[i];
    if (told[i] || first.state == State::kEnded) {
      continue;
    }
    unsigned count = 0;
    for (unsigned j = i; j < num_threads; ++j) {
      const Thread& other = threads[j];
      if (other.state == first.state && other.function == first.function && other.site == first.site &&
          other.mask == first.mask) {
        told[j] = true;
        ++count;
      }
    }
    text << "\n  thread " << first.index;
    if (count > 1) {
      text << " and " << count - 1 << " more";
    }
    text << " in " << first.function;
    if (first.state == State::kInWarp) {
      text << std::hex << " with mask 0x" << first.mask << std::dec;
    }
    text << " at " << first.site;
  }
  const std::string waiting = text.str();
  fail("deadlock: threads wait for each other", waiting);
}

Thread& next_thread() {
  if (ready.empty()) {
    fail_by_deadlock();
  }
  return threads[ready.pop()];
}

void run_next() {
  Thread& next = next_thread();
  if (&next != current) {
    Fiber& from = current->fiber;
    current = &next;
    threadIdx = next.index;
    go_on(from, next.fiber);
  }
}

void open_barrier() {
  last_votes = votes;
  votes = {0, 0};
  at_barrier = 0;
  ++steps;
  uint16_t order[kMaxThreads];
  unsigned count = 0;
  for (unsigned i = 0; i < num_threads; ++i) {
    if (threads[i].state == State::kAtBarrier) {
      threads[i].state = State::kReady;
      order[count++] = i;
    }
  }
  share_work(order, count, &work_of_barriers[block_place]);
  if (shuffled) {
    chance.shuffle(order, count);
  }
  for (unsigned i = 0; i < count; ++i) {
    ready.push_back(order[i]);
  }
}

void end_thread() {
  if (!current->copies.empty()) {
    fail("thread ", current->index, " has ended without waiting for the copies that it has begun");
  }
  leave_work(&work_of_blocks[block_place][block_turn]);
  leave_work(&work_of_grid[1]);
  Warp& warp = warps[current->number / kWarpSize];
  const unsigned bit = 1u << current->number % kWarpSize;
  for (const Group& group : warp.groups) {
    if (group.mask & bit) {
      fail("thread ", current->index, " has ended, but others wait for it in ", group.function, " at ", group.site);
    }
  }
  warp.ended |= bit;
  current->state = State::kEnded;
  --alive;
  if (alive > 0 && at_barrier == alive) {
    open_barrier();
  }
  if (alive == 0) {
    Fiber& from = current->fiber;
    current = nullptr;
    go_on(from, caller);
  } else {
    run_next();
  }
}

// The main function of a fiber, which runs one thread after another.
void live() {
  complete_switch(current->fiber);
  for (;;) {
    take_over_work(&work_of_blocks[block_place][1 - block_turn]);
    take_over_work(&work_of_grid[0]);
    std::exception_ptr reason;
    try {
      kernel(kernel_arguments);
    } catch (...) {
      reason = std::current_exception();
    }
    if (reason) {
      give_up(std::move(reason));
    }
    end_thread();
  }
}

void complete(Warp& warp, size_t which) {
  const Group group = warp.groups[which];
  warp.groups[which] = warp.groups.back();
  warp.groups.pop_back();
  Thread* first = threads + (&warp - warps) * kWarpSize;
  uint16_t order[kWarpSize];
  unsigned count = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (group.mask >> lane & 1) {
      Thread& thread = first[lane];
      thread.result = group.is_vote ? group.ballot : group.values[group.sources[lane]];
      thread.state = State::kReady;
      order[count++] = thread.number;
    }
  }
  // Shuffles and votes do not order memory accesses.
  if (group.function == kSyncWarp) {
    share_work(order, count, &work_of_warps[block_place][&warp - warps]);
  }
  if (shuffled) {
    chance.shuffle(order, count);
  }
  // Ahead of the other warps, or after them.
  const bool hurry = shuffled && chance.below(2) == 0;
  for (unsigned i = 0; i < count; ++i) {
    hurry ? ready.push_front(order[i]) : ready.push_back(order[i]);
  }
}

uint64_t wait_for_warp(
    unsigned mask, bool is_vote, uint64_t value, unsigned source, const char* function, const Site& site) {
  Thread& me = *current;
  const unsigned lane = me.number % kWarpSize;
  Warp& warp = warps[me.number / kWarpSize];
  if (!(mask >> lane & 1)) {
    fail("thread ", me.index, ": ", function, " at ", site, " is called by a lane that its mask leaves out");
  }
  if (mask & warp.ended) {
    fail("thread ", me.index, ": the mask of ", function, " at ", site, " names a lane that has ended or never was");
  }
  if (!is_vote && !(mask >> source & 1)) {
    fail("thread ", me.index, ": ", function, " at ", site, " reads lane ", source, ", which its mask leaves out");
  }
  size_t which = 0;
  while (which < warp.groups.size()) {
    const Group& group = warp.groups[which];
    if (group.mask == mask && group.function == function && group.site == site) {
      break;
    }
    ++which;
  }
  if (which == warp.groups.size()) {
    warp.groups.emplace_back();
    Group& group = warp.groups.back();
    group.mask = mask;
    group.arrived = group.ballot = 0;
    group.is_vote = is_vote;
    group.function = function;
    group.site = site;
  }
  Group& group = warp.groups[which];
  group.arrived |= 1u << lane;
  group.values[lane] = value;
  group.sources[lane] = source;
  if (is_vote && value) {
    group.ballot |= 1u << lane;
  }
  me.state = State::kInWarp;
  me.function = function;
  me.site = site;
  me.mask = mask;
  if (group.arrived == mask) {
    complete(warp, which);
  }
  run_next();
  return me.result;
}

void run_block(dim3 shape) {
  ++block_serial;
  threads = all_threads + block_place * num_threads;
  static_bytes = 0;
  steps = 1;
  alive = num_threads;
  at_barrier = 0;
  votes = {0, 0};
  ready.clear();
  for (unsigned w = 0; w * kWarpSize < num_threads; ++w) {
    const unsigned lanes = num_threads - w * kWarpSize;
    warps[w].ended = lanes < kWarpSize ? ~0u << lanes : 0;
    warps[w].groups.clear();
  }
  uint16_t order[kMaxThreads];
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    thread.number = i;
    thread.index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
    thread.state = State::kReady;
    thread.mask = 0;
    thread.copies.clear();
    thread.batches = 0;
    order[i] = i;
    if (!thread.fiber.started) {
      start(thread.fiber, i);
    }
  }
  if (shuffled) {
    chance.shuffle(order, num_threads);
  }
  for (unsigned i = 0; i < num_threads; ++i) {
    ready.push_back(order[i]);
  }
  current = &next_thread();
  threadIdx = current->index;
  go_on(caller, current->fiber);
  if (error) {
    // Waiting threads are never resumed; their fibers are started anew.
    for (Thread& thread : all_threads) {
      thread.fiber.started = false;
    }
    std::rethrow_exception(std::exchange(error, nullptr));
  }
}

uint64_t seed() {
  const char* text = std::getenv("GROOTVL_EMULATION_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

}  // namespace

void run(
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    size_t shared_limit,
    const char* signature,
    void (*body)(const void*),
    const void* arguments) {
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  dynamic_bytes = shared_bytes;
  most_shared_bytes = shared_limit;
  const uint64_t number = seed();
  shuffled = number != 0;
  chance = Random(number + (++grids << 32));
  gridDim = grid;
  blockDim = block;
  num_threads = block.x * block.y * block.z;
  kernel = body;
  kernel_arguments = arguments;
  caller.started = true;
  caller.stack = nullptr;
#ifdef EMULATED_THREADS_ARE_WATCHED
  caller.watched = __tsan_get_current_fiber();
#endif
  std::vector<uint32_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) {
    chance.shuffle(order.data(), order.size());
  }
  const unsigned places = std::min<size_t>(kMostPlaces, std::size(all_threads) / num_threads);
  struct Memory {
    void* of_places[kMostPlaces] = {};

    ~Memory() {
      std::for_each(std::begin(of_places), std::end(of_places), std::free);
    }
  } memory;
  uint64_t most_steps = 0;
  most_copies = copied_bytes = 0;
  leave_work(&work_of_grid[0]);
  for (size_t run = 0; run < order.size(); ++run) {
    const uint32_t i = order[run];
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    block_place = run % places;
    block_turn = run / places % 2;
    void*& shared = memory.of_places[block_place];
    if (shared == nullptr && shared_bytes > 0) {
      shared = allocate_shared(shared_bytes);
    }
    dynamic_shared_memory = shared;
    fill_with_garbage(shared, shared_bytes);
    run_block(block);
    most_steps = std::max(most_steps, steps);
  }
  take_over_work(&work_of_grid[1]);
  if (const char* file = std::getenv("GROOTVL_EMULATION_LOG")) {
    std::ofstream(file, std::ios::app) << "{\"signature\": \"" << signature << "\", \"blocks\": " << order.size()
                                       << ", \"threads\": " << num_threads << ", \"steps\": " << most_steps
                                       << ", \"shared_bytes\": " << shared_bytes << ", \"copies\": " << most_copies
                                       << ", \"copied_bytes\": " << copied_bytes << "}\n";
  }
}

Votes wait_for_block(bool vote, const char* function, Site site) {
  Thread& me = *current;
  if (at_barrier == 0) {
    barrier = &me;
  } else if (!(barrier->function == function && barrier->site == site)) {
    fail(
        "thread ",
        me.index,
        " is in ",
        function,
        " at ",
        site,
        " while thread ",
        barrier->index,
        " waits in ",
        barrier->function,
        " at ",
        barrier->site);
  }
  me.state = State::kAtBarrier;
  me.function = function;
  me.site = site;
  ++votes.voters;
  votes.count += vote;
  if (++at_barrier == alive) {
    open_barrier();
  }
  run_next();
  return last_votes;
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* function, Site site) {
  return wait_for_warp(mask, false, value, source, function, site);
}

unsigned vote(unsigned mask, bool vote, const char* function, Site site) {
  return static_cast<unsigned>(wait_for_warp(mask, true, vote, 0, function, site));
}

void copy_later(void* to, const void* from, size_t bytes, const char* function, Site site) {
  const auto is_aligned = [bytes](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || !is_aligned(to) || !is_aligned(from)) {
    fail(
        "thread ",
        current->index,
        ": ",
        function,
        " at ",
        site,
        " copies 4, 8 or 16 bytes between multiples of as many, got ",
        bytes,
        " from ",
        from,
        " to ",
        to);
  }
#ifdef EMULATED_THREADS_ARE_WATCHED
  __tsan_write_range(to, bytes);
#endif
  fill_with_garbage(to, bytes);
  copied_bytes += bytes;
  current->copies.push_back({to, from, bytes, current->batches});
}

void commit_copies() {
  ++current->batches;
}

void wait_for_copies(size_t batches) {
  std::vector<Copy>& copies = current->copies;
  most_copies = std::max<uint64_t>(most_copies, copies.size());
  const auto end = std::find_if(
      copies.begin(), copies.end(), [&](const Copy& copy) { return copy.batch + batches >= current->batches; });
  for (auto copy = copies.begin(); copy != end; ++copy) {
#ifdef EMULATED_THREADS_ARE_WATCHED
    __tsan_read_range(const_cast<void*>(copy->from), copy->bytes);
    __tsan_write_range(copy->to, copy->bytes);
#endif
    std::memcpy(copy->to, copy->from, copy->bytes);
  }
  copies.erase(copies.begin(), end);
}

void pause() {
  if (shuffled && chance.below(8) == 0) {
    ready.push_back(current->number);
    run_next();
  }
}

unsigned lane() {
  return current->number % kWarpSize;
}

void count_shared_variable(size_t bytes) {
  static_bytes += bytes;
  if (dynamic_bytes + static_bytes > most_shared_bytes) {
    fail(
        "the launch is refused: ",
        dynamic_bytes,
        " bytes of dynamic and ",
        static_bytes,
        " of static shared memory, the kernel may have ",
        most_shared_bytes);
  }
}

void* allocate_shared(size_t bytes) {
  void* memory;
  if (posix_memalign(&memory, 128, bytes) != 0) {
    throw std::bad_alloc();
  }
  return memory;
}

void fill_with_garbage(void* memory, size_t bytes) {
  // NaN in any floating format, and an invalid index.
  constexpr uint8_t kGarbage[2] = {0xfd, 0xff};
  auto* to = static_cast<uint8_t*>(memory);
  for (size_t i = 0; i < bytes; ++i) {
    to[i] = kGarbage[i % 2];
  }
}

}  // namespace emulation
