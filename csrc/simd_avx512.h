// Vectors of 16 for tile.h, scan.h and logprobs_kernels.h: AVX-512 F, BW, DQ, VL.

#pragma once

#include <immintrin.h>

#include "half.h"
#include "noise.h"

namespace {

struct Avx512Words {
  __m512i v;
  Avx512Words(__m512i vector) : v(vector) {}
  explicit Avx512Words(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

inline Avx512Words operator+(Avx512Words a, Avx512Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Avx512Words operator*(Avx512Words a, Avx512Words b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Avx512Words operator^(Avx512Words a, Avx512Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Avx512Words operator<<(Avx512Words a, int bits) { return {_mm512_slli_epi32(a.v, bits)}; }
inline Avx512Words operator>>(Avx512Words a, int bits) { return {_mm512_srli_epi32(a.v, bits)}; }

template <int kBits>
inline Avx512Words rotate_left(Avx512Words a) {
  return {_mm512_rol_epi32(a.v, kBits)};
}

struct Avx512 {
  using Floats = __m512;
  using Words = Avx512Words;
  static constexpr int kWidth = 16;
  static constexpr float kHashUnit = 1.0f;

  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Floats load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  static void store(BFloat16* p, Floats x) {  // rounds as store in half.h does
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i high = _mm512_srli_epi32(rounded, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
  static void store(Half* p, Floats x) {
    const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  static Floats all(float x) { return _mm512_set1_ps(x); }
  static Words consecutive(uint32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(lanes, Words(first).v)};
  }

  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is NaN
  static float max_of(Floats a) { return _mm512_reduce_max_ps(a); }
  static float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
  static uint32_t less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  // value, or 0 in the lanes where x < limit
  static Floats zero_where_less(Floats x, Floats limit, Floats value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), value);
  }
  static Floats to_floats(Words a) { return _mm512_cvtepu32_ps(a.v); }

  static Floats fraction(Floats t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF); }  // t - floor(t)
  static Floats times_power_of_floor(Floats a, Floats t) { return _mm512_scalef_ps(a, t); }  // a * 2^floor(t)
};

}  // namespace
