// Stream compaction: numbers or lists the elements that satisfy a condition, in order. Scalar code depends on the count
// so far at every step; AVX-512 can compress whole vectors.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

namespace grootvl::cpu {

// The weight of a missing edge, larger than that of any edge.
inline constexpr uint32_t kNoEdge = 0xffffffff;

// Packs two numbers into one word, ordered by `high`, then by `low`.
inline uint64_t pack(uint32_t high, uint32_t low) {
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Compaction {
  // Numbers the components c in begin..count-1 that point to themselves, starting at `number`: id[c] is that number, or
  // -1 for the other components. Returns the next free number.
  static int32_t number_roots(
      int32_t count, const int32_t* __restrict pointer, int32_t* __restrict id, int32_t begin = 0, int32_t number = 0) {
    for (int32_t c = begin; c < count; ++c) {
      const int32_t is_root = pointer[c] == c;
      id[c] = number | (is_root - 1);
      number += is_root;
    }
    return number;
  }

  // Lists the existing edges i in 0..count-1 whose components from[i] and to[i] differ. ends packs the components, keys
  // the weight and the index `first` + i. Returns their number. Up to 8 words after the list may be overwritten.
  static int64_t list_crossing(
      int64_t count,
      const int32_t* __restrict from,
      const int32_t* __restrict to,
      const uint32_t* __restrict weight,
      uint32_t first,
      uint64_t* __restrict ends,
      uint64_t* __restrict keys) {
    int64_t listed = 0;
    for (int64_t i = 0; i < count; ++i) {
      ends[listed] = pack(from[i], to[i]);
      keys[listed] = pack(weight[i], first + static_cast<uint32_t>(i));
      listed += (from[i] != to[i]) & (weight[i] != kNoEdge);
    }
    return listed;
  }
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

// The same in vectors of 16 and 8 elements.
struct CompactionAvx512 {
  static int32_t number_roots(int32_t count, const int32_t* __restrict pointer, int32_t* __restrict id) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t c = 0, number = 0;
    for (; c + 16 <= count; c += 16) {
      const __m512i own = _mm512_add_epi32(_mm512_set1_epi32(c), lanes);
      const __mmask16 roots = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(pointer + c), own);
      const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(number), lanes);
      _mm512_storeu_si512(id + c, _mm512_mask_expand_epi32(_mm512_set1_epi32(-1), roots, numbers));
      number += __builtin_popcount(roots);
    }
    return Compaction::number_roots(count, pointer, id, c, number);
  }

  static int64_t list_crossing(
      int64_t count,
      const int32_t* __restrict from,
      const int32_t* __restrict to,
      const uint32_t* __restrict weight,
      uint32_t first,
      uint64_t* __restrict ends,
      uint64_t* __restrict keys) {
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    int64_t listed = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m256i u = load(from + i), v = load(to + i), w = load(weight + i);
      const __mmask8 crossing =
          _mm256_cmpneq_epi32_mask(u, v) & _mm256_cmpneq_epi32_mask(w, _mm256_set1_epi32(kNoEdge));
      const __m512i edges = _mm512_add_epi64(_mm512_set1_epi64(first + i), lanes);
      _mm512_storeu_si512(ends + listed, _mm512_maskz_compress_epi64(crossing, packed(u, _mm512_cvtepu32_epi64(v))));
      _mm512_storeu_si512(keys + listed, _mm512_maskz_compress_epi64(crossing, packed(w, edges)));
      listed += __builtin_popcount(crossing);
    }
    const uint32_t next = first + static_cast<uint32_t>(i);
    return listed +
           Compaction::list_crossing(count - i, from + i, to + i, weight + i, next, ends + listed, keys + listed);
  }

 private:
  static __m256i load(const void* values) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(values));
  }

  static __m512i packed(__m256i high, __m512i low) {
    return _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(high), 32), low);
  }
};

#pragma GCC pop_options
#endif

}  // namespace grootvl::cpu
