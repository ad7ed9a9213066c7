// Vectors of 8 for tile.h, scan.h and logprobs_kernels.h: AVX2, FMA, F16C.

#pragma once

#include <immintrin.h>

#include "half.h"
#include "noise.h"

namespace {

struct Avx2Words {
  __m256i v;
  Avx2Words(__m256i vector) : v(vector) {}
  explicit Avx2Words(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

inline Avx2Words operator+(Avx2Words a, Avx2Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Avx2Words operator*(Avx2Words a, Avx2Words b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline Avx2Words operator^(Avx2Words a, Avx2Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Avx2Words operator<<(Avx2Words a, int bits) { return {_mm256_slli_epi32(a.v, bits)}; }
inline Avx2Words operator>>(Avx2Words a, int bits) { return {_mm256_srli_epi32(a.v, bits)}; }

template <int kBits>
inline Avx2Words rotate_left(Avx2Words a) {
  return {_mm256_or_si256(_mm256_slli_epi32(a.v, kBits), _mm256_srli_epi32(a.v, 32 - kBits))};
}

struct Avx2 {
  using Floats = __m256;
  using Words = Avx2Words;
  static constexpr int kWidth = 8;
  static constexpr float kHashUnit = 256.0f;  // AVX2 converts signed integers only, so to_floats drops 8 bits

  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Floats load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
  static void store(BFloat16* p, Floats x) {  // rounds as store in half.h does
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m128i low = _mm256_castsi256_si128(result), high = _mm256_extracti128_si256(result, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  static void store(Half* p, Floats x) {
    const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
  static Floats all(float x) { return _mm256_set1_ps(x); }
  static Words consecutive(uint32_t first) {
    return {_mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), Words(first).v)};
  }

  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b where one is NaN
  static float max_of(Floats a) {
    float lanes[kWidth], result = -INFINITY;
    _mm256_storeu_ps(lanes, a);
    for (float x : lanes) result = x > result ? x : result;
    return result;
  }
  static float sum_of(Floats a) {
    float lanes[kWidth], result = 0;
    _mm256_storeu_ps(lanes, a);
    for (float x : lanes) result += x;
    return result;
  }
  static uint32_t less(Floats a, Floats b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
  }
  // value, or 0 in the lanes where x < limit
  static Floats zero_where_less(Floats x, Floats limit, Floats value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), value);
  }
  static Floats to_floats(Words a) { return _mm256_cvtepi32_ps((a >> 8).v); }

  static Floats fraction(Floats t) { return subtract(t, _mm256_floor_ps(t)); }
  // a * 2^floor(t), for -126 <= t <= 0: the exponent is written into its bits.
  static Floats times_power_of_floor(Floats a, Floats t) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(t)), _mm256_set1_epi32(127));
    return multiply(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
};

}  // namespace
