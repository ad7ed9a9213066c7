// Linear layers in W8A8 on CPUs with AVX-512 VNNI: weights are quantized and packed in one pass, and a product
// quantizes its rows itself. Interface and rules are documented in rollout/quantization/int8.py, beside a reference.
//
// A packed weight is a sequence of blocks of 64 output channels; within a block, four consecutive inputs of all 64
// channels follow one another, as the instruction `vpdpbusd` wants them. That instruction multiplies unsigned by signed
// numbers, so activations are shifted by 128, and the sums of a channel's weights take the shift off again. Sums are
// int32 and exact: the rows of a batch do not change each other's results, nor do the threads.

#include "int8.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChannels = kInt8Channels, kQuad = kInt8Quad;
constexpr int kRows = 6;  // rows of a tile: with four vectors each, 24 of 32 registers

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

__m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
__m512 load(const uint16_t* p, __mmask16 mask) {  // bfloat16
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

void store(float* p, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(p, mask, value); }
void store(uint16_t* p, __mmask16 mask, __m512 value) {  // bfloat16, rounded to nearest even
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(result));
}

__mmask16 mask_of(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

// A row, and what each of its elements is multiplied with first (nullptr: nothing).
template <class T>
struct Row {
  const T* data;
  const float* factors;

  __m512 at(int64_t i, __mmask16 mask) const {
    const __m512 value = load(data + i, mask);
    return factors ? _mm512_mul_ps(value, load(factors + i, mask)) : value;
  }
};

// Quantizes a row symmetrically to `out`, padded with zeros to `padded` bytes; returns its scale. What lies beyond
// `clip` of the largest element is clipped. Adds to `rounding`, if there is one.
template <class T>
float quantize_row(const Row<T>& row, float clip, int64_t size, int64_t padded, int8_t* out, Int8Rounding* rounding) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 value = row.at(i, mask_of(size - i));
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  const float limit = clip * _mm512_reduce_max_ps(largest), scale = limit / 127.0f;
  const __m512 inverse = _mm512_set1_ps(limit > 0 ? 127.0f / limit : 0.0f);
  __m512 error = _mm512_setzero_ps(), norm = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 value = i < size ? row.at(i, mask_of(size - i)) : _mm512_setzero_ps();
    __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    rounded = _mm512_min_epi32(_mm512_max_epi32(rounded, _mm512_set1_epi32(-127)), _mm512_set1_epi32(127));
    _mm_mask_storeu_epi8(out + i, mask_of(padded - i), _mm512_cvtepi32_epi8(rounded));
    if (rounding) {
      const __m512 difference = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), _mm512_set1_ps(scale), value);
      error = _mm512_fmadd_ps(difference, difference, error);
      norm = _mm512_fmadd_ps(value, value, norm);
      if (clip < 1) {
        const __mmask16 beyond = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(limit), _CMP_GT_OQ);
        rounding->clipped += __builtin_popcount(beyond);
      }
    }
  }
  if (rounding) {
    rounding->error += _mm512_reduce_add_ps(error);
    rounding->norm += _mm512_reduce_add_ps(norm);
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// Quantizes and packs the 64 channels of a block, 16 at a time.
template <class T>
void pack_block(const Int8Rows& from, float clip, const Int8Weight& to, int64_t block, Int8Rounding* rounding) {
  const int64_t padded = int8_round_up(to.inputs, kQuad);
  const int64_t apart = padded + 64;  // of two channels in `rows`: at a power of two they would share cache sets
  std::vector<int8_t> rows(16 * apart);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(apart)));
  for (int64_t part = 0; part < kChannels; part += 16) {
    const int64_t first = block * kChannels + part;
    const int64_t live = std::clamp<int64_t>(to.channels - first, 0, 16);
    for (int64_t lane = 0; lane < live; ++lane) {
      const Row<T> row{static_cast<const T*>(from.data) + (first + lane) * from.stride, from.factors};
      to.scales[first + lane] = quantize_row(row, clip, to.inputs, padded, rows.data() + lane * apart, rounding);
    }
    std::fill(rows.begin() + live * apart, rows.end(), int8_t{0});
    int8_t* target = to.blocks + block * kChannels * padded + part * kQuad;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += kQuad) {
      const __m512i quads = _mm512_i32gather_epi32(offsets, rows.data() + i, 1);
      _mm512_storeu_si512(target + i * kChannels, quads);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), quads);
    }
    if (live > 0) _mm512_mask_storeu_epi32(to.sums + first, mask_of(live), sum);
  }
}

// Sums of products of `Rows` rows with one block. The loops over rows and parts must disappear: `total` is registers.
template <int Rows>
void sum_tile(const int8_t* w, int64_t padded, const uint8_t* x, __m512i (*sums)[4]) {
  __m512i total[Rows][4];
#pragma GCC unroll 24
  for (int i = 0; i < Rows * 4; ++i) total[i / 4][i % 4] = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded; i += kQuad, w += kChannels * kQuad) {
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
    const __m512i w2 = _mm512_loadu_si512(w + 128), w3 = _mm512_loadu_si512(w + 192);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      int32_t quad;
      std::memcpy(&quad, x + r * padded + i, kQuad);
      const __m512i a = _mm512_set1_epi32(quad);
      total[r][0] = _mm512_dpbusd_epi32(total[r][0], a, w0);
      total[r][1] = _mm512_dpbusd_epi32(total[r][1], a, w1);
      total[r][2] = _mm512_dpbusd_epi32(total[r][2], a, w2);
      total[r][3] = _mm512_dpbusd_epi32(total[r][3], a, w3);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < Rows * 4; ++i) sums[i / 4][i % 4] = total[i / 4][i % 4];
}

// From the sums of `rows` rows with a block to their results.
template <class T>
void scale_tile(const Int8Weight& weight, const float* bias, int64_t block, int64_t rows, const __m512i (*sums)[4], const float* x_scales,
                T* out) {
  for (int part = 0; part < 4; ++part) {
    const int64_t channel = block * kChannels + part * 16;
    if (channel >= weight.channels) break;
    const __mmask16 mask = mask_of(weight.channels - channel);
    const __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, weight.sums + channel), 7);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, weight.scales + channel);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][part], shift));
      __m512 value = _mm512_mul_ps(_mm512_mul_ps(sum, scale), _mm512_set1_ps(x_scales[r]));
      if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + channel));
      store(out + r * weight.channels + channel, mask, value);
    }
  }
}

template <class T>
void multiply_block(const Int8Weight& weight, const float* bias, int64_t block, int64_t rows, const uint8_t* x, const float* x_scales,
                    T* out) {
  const int64_t padded = int8_round_up(weight.inputs, kQuad);
  const int8_t* w = weight.blocks + block * kChannels * padded;
  __m512i sums[kRows][4];
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t live = std::min<int64_t>(rows - r, kRows);
    const uint8_t* tile = x + r * padded;
    switch (live) {
      case 1: sum_tile<1>(w, padded, tile, sums); break;
      case 2: sum_tile<2>(w, padded, tile, sums); break;
      case 3: sum_tile<3>(w, padded, tile, sums); break;
      case 4: sum_tile<4>(w, padded, tile, sums); break;
      case 5: sum_tile<5>(w, padded, tile, sums); break;
      default: sum_tile<kRows>(w, padded, tile, sums);
    }
    scale_tile(weight, bias, block, live, sums, x_scales + r, out + r * weight.channels);
  }
}

template <class T>
void quantize_activations(const Row<T>& row, int64_t size, int64_t padded, uint8_t* out, float* scale) {
  *scale = quantize_row(row, 1, size, padded, reinterpret_cast<int8_t*>(out), nullptr);
  const __m512i top = _mm512_set1_epi8(-128);  // adding 128 is flipping the highest bit
  for (int64_t i = 0; i < padded; i += 64) {
    const __mmask64 mask = padded - i >= 64 ? ~0ull : (1ull << (padded - i)) - 1;
    _mm512_mask_storeu_epi8(out + i, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, out + i), top));
  }
}

template <class T>
void linear(const Int8Rows& x, const Int8Weight& weight, const float* bias, T* out, const Workers& workers) {
  const int64_t padded = int8_round_up(weight.inputs, kQuad);
  std::vector<uint8_t> quantized(x.rows * padded);
  std::vector<float> scales(x.rows);
  share_out(workers, x.rows, 64, [&](int64_t i) {
    const Row<T> row{static_cast<const T*>(x.data) + i * x.stride, x.factors};
    quantize_activations(row, weight.inputs, padded, quantized.data() + i * padded, &scales[i]);
  });
  share_out(workers, int8_blocks(weight.channels), 1, [&](int64_t block) {
    multiply_block(weight, bias, block, x.rows, quantized.data(), scales.data(), out);
  });
}

#pragma GCC pop_options
#endif

}  // namespace

bool int8_supported() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

#ifdef __x86_64__
void int8_pack_cpu(const Int8Rows& from, float clip, const Int8Weight& to, Int8Rounding* rounding,
                   const Workers& workers) {
  share_out(workers, int8_blocks(to.channels), 1, [&](int64_t block) {
    const auto pack = from.dtype == Dtype::kFloat32 ? pack_block<float> : pack_block<uint16_t>;
    Int8Rounding sums;  // apart from those of the other threads
    pack(from, clip, to, block, &sums);
    rounding[block] = sums;
  });
}

void int8_linear_cpu(const Int8Rows& x, const Int8Weight& weight, const float* bias, void* out,
                     const Workers& workers) {
  if (x.dtype == Dtype::kFloat32) {
    linear(x, weight, bias, static_cast<float*>(out), workers);
  } else {
    linear(x, weight, bias, static_cast<uint16_t*>(out), workers);
  }
}
#else
void int8_pack_cpu(const Int8Rows&, float, const Int8Weight&, Int8Rounding*, const Workers&) {}
void int8_linear_cpu(const Int8Rows&, const Int8Weight&, const float*, void*, const Workers&) {}
#endif
