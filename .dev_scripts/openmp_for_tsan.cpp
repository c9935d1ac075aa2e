// Makes ThreadSanitizer aware of the synchronization at the start and end of parallel regions in GCC's OpenMP runtime,
// which is not instrumented. Linked into the operators with --wrap=GOMP_parallel, see sanitize_ops.sh.
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __real_GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
}

namespace {

struct Region {
  void (*function)(void*);
  void* data;
};

void run(void* argument) {
  auto* region = static_cast<Region*>(argument);
  __tsan_acquire(region);
  region->function(region->data);
  __tsan_release(region);
}

}  // namespace

extern "C" void __wrap_GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  Region region{function, data};
  __tsan_release(&region);
  __real_GOMP_parallel(run, &region, threads, flags);
  __tsan_acquire(&region);
}
