// Replaces CUDA's header of this name: asynchronous copies from global to shared memory. They are performed as late as
// possible, so that premature reads find garbage.
#pragma once

#include "../emulator.h"

inline void __pipeline_memcpy_async(
    void* to, const void* from, size_t bytes, emulation::Site site = emulation::Site::here()) {
  emulation::copy_later(to, from, bytes, "__pipeline_memcpy_async", site);
}

inline void __pipeline_commit() {
  emulation::commit_copies();
}

inline void __pipeline_wait_prior(size_t batches) {
  emulation::wait_for_copies(batches);
}
