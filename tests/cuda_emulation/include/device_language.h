// Keywords and functions of device code that are built into nvcc, with CUDA's names, types and results.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include <cstring>
#include <type_traits>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

constexpr int warpSize = emulation::kWarpSize;

namespace emulation {

// A non-deduced parameter: any number converts to it, as for a function that is not a template.
template <typename T>
using Exactly = std::common_type_t<T>;

template <typename T, typename... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* function, Site site) {
  static_assert(
      is_one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>,
      "CUDA shuffles no such type");
  uint64_t carried = 0;
  std::memcpy(&carried, &value, sizeof(value));
  carried = exchange(mask, carried, source, function, site);
  std::memcpy(&value, &carried, sizeof(value));
  return value;
}

}  // namespace emulation

// Barriers

inline void __syncthreads(emulation::Site site = emulation::Site::here()) {
  emulation::wait_for_block(false, "__syncthreads", site);
}

inline int __syncthreads_count(int predicate, emulation::Site site = emulation::Site::here()) {
  return static_cast<int>(emulation::wait_for_block(predicate != 0, "__syncthreads_count", site).count);
}

inline int __syncthreads_or(int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::wait_for_block(predicate != 0, "__syncthreads_or", site).count > 0;
}

inline int __syncthreads_and(int predicate, emulation::Site site = emulation::Site::here()) {
  const emulation::Votes votes = emulation::wait_for_block(predicate != 0, "__syncthreads_and", site);
  return votes.count == votes.voters;
}

inline void __syncwarp(unsigned mask = 0xffffffff, emulation::Site site = emulation::Site::here()) {
  emulation::vote(mask, false, emulation::kSyncWarp, site);
}

inline void __threadfence_block() {}
inline void __threadfence() {}

// Warps

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::vote(mask, predicate != 0, "__ballot_sync", site);
}

inline int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::vote(mask, predicate != 0, "__any_sync", site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
  return emulation::vote(mask, predicate != 0, "__all_sync", site) == mask;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, emulation::Site site = emulation::Site::here()) {
  const unsigned me = emulation::lane();
  const unsigned source = (me & ~(width - 1)) | (lane & (width - 1));
  return emulation::shuffle(mask, value, source, "__shfl_sync", site);
}

template <typename T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = warpSize, emulation::Site site = emulation::Site::here()) {
  const unsigned me = emulation::lane();
  const unsigned source = (me & (width - 1)) < delta ? me : me - delta;
  return emulation::shuffle(mask, value, source, "__shfl_up_sync", site);
}

template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = warpSize, emulation::Site site = emulation::Site::here()) {
  const unsigned me = emulation::lane();
  const unsigned source = (me & (width - 1)) + delta >= static_cast<unsigned>(width) ? me : me + delta;
  return emulation::shuffle(mask, value, source, "__shfl_down_sync", site);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int lanes, int width = warpSize, emulation::Site site = emulation::Site::here()) {
  const unsigned me = emulation::lane();
  const unsigned other = me ^ lanes;
  const unsigned source = other > (me | (width - 1)) ? me : other;
  return emulation::shuffle(mask, value, source, "__shfl_xor_sync", site);
}

// Atomics

namespace emulation {

template <typename T>
T load(const T* address) {
  T value;
  __atomic_load(address, &value, __ATOMIC_RELAXED);
  return value;
}

template <typename T>
void store(T* address, T value) {
  __atomic_store(address, &value, __ATOMIC_RELAXED);
}

}  // namespace emulation

#define EMULATED_ATOMIC(name, result, ...)                              \
  template <typename T>                                                 \
  T name(T* address, emulation::Exactly<T> value) {                     \
    static_assert(emulation::is_one_of<T, __VA_ARGS__>, "not in CUDA"); \
    emulation::pause();                                                 \
    const T old = emulation::load(address);                             \
    emulation::store<T>(address, result);                               \
    return old;                                                         \
  }

EMULATED_ATOMIC(atomicAdd, (old + value), int, unsigned, unsigned long long, float, double)
EMULATED_ATOMIC(atomicSub, (old - value), int, unsigned)
EMULATED_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
EMULATED_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, long long, unsigned long long)
EMULATED_ATOMIC(atomicAnd, (old & value), int, unsigned, unsigned long long)
EMULATED_ATOMIC(atomicOr, (old | value), int, unsigned, unsigned long long)
EMULATED_ATOMIC(atomicXor, (old ^ value), int, unsigned, unsigned long long)
EMULATED_ATOMIC(atomicExch, value, int, unsigned, unsigned long long, float)

#undef EMULATED_ATOMIC

template <typename T>
T atomicCAS(T* address, emulation::Exactly<T> expected, emulation::Exactly<T> value) {
  static_assert(emulation::is_one_of<T, unsigned short, int, unsigned, unsigned long long>, "not in CUDA");
  emulation::pause();
  const T old = emulation::load(address);
  if (old == expected) {
    emulation::store<T>(address, value);
  }
  return old;
}

// Memory, bits and numbers

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}

inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}

inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}

inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(x);
}

inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(x);
}

inline int __float_as_int(float x) {
  return emulation::bits<int>(x);
}

inline unsigned __float_as_uint(float x) {
  return emulation::bits<unsigned>(x);
}

inline float __int_as_float(int x) {
  return emulation::bits<float>(x);
}

inline float __uint_as_float(unsigned x) {
  return emulation::bits<float>(x);
}

inline long long __double_as_longlong(double x) {
  return emulation::bits<long long>(x);
}

inline double __longlong_as_double(long long x) {
  return emulation::bits<double>(x);
}

template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return fmin(T(a), T(b));
  } else {
    return T(b) < T(a) ? T(b) : T(a);
  }
}

template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return fmax(T(a), T(b));
  } else {
    return T(a) < T(b) ? T(b) : T(a);
  }
}

inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}

inline float rsqrt(float x) {
  return 1 / sqrtf(x);
}

inline double rsqrt(double x) {
  return 1 / sqrt(x);
}

inline float __fdividef(float x, float y) {
  return x / y;
}

// glibc declares functions with these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
