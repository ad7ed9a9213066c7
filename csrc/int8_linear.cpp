// Linear layers in W8A8 on CPUs with AVX-512 VNNI: weights are quantized and packed in one pass, and a product
// quantizes its rows itself. Interface and rules are documented in rollout/int8.py, beside a reference in PyTorch.
//
// A packed weight is a sequence of blocks of 64 output channels; within a block, four consecutive inputs of all 64
// channels follow one another, as the instruction `vpdpbusd` wants them. That instruction multiplies unsigned by signed
// numbers, so activations are shifted by 128, and the sums of a channel's weights take the shift off again. Sums are
// int32 and exact: the rows of a batch do not change each other's results, nor do the threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "tensors.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChannels = 64;  // output channels of a block: four vectors of 16
constexpr int64_t kQuad = 4;       // inputs that one instruction adds up
constexpr int kRows = 6;           // rows of a tile: with four vectors each, 24 of 32 registers

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

bool supported() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

struct Packed {
  const int8_t* blocks;
  const float* scales;
  const int32_t* sums;
  const float* bias;  // or nullptr
  int64_t inputs, channels;
};

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

// Quantizes a row symmetrically to `out`, padded with zeros to `padded` bytes; returns its scale.
template <class T>
float quantize_row(const T* row, int64_t size, int64_t padded, int8_t* out) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 value = load(row + i, mask_of(size - i));
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  const float amax = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(amax > 0 ? 127.0f / amax : 0.0f);
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 value = i < size ? load(row + i, mask_of(size - i)) : _mm512_setzero_ps();
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    _mm_mask_storeu_epi8(out + i, mask_of(padded - i), _mm512_cvtsepi32_epi8(rounded));
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : amax / 127.0f;
}

// Quantizes and packs the 64 channels of a block, 16 at a time.
template <class T>
void pack_block(const T* weight, int64_t stride, int64_t inputs, int64_t channels, int64_t block, int8_t* packed,
                float* scales, int32_t* sums) {
  const int64_t padded = round_up(inputs, kQuad);
  const int64_t apart = padded + 64;  // of two channels in `rows`: at a power of two they would share cache sets
  std::vector<int8_t> rows(16 * apart);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(apart)));
  for (int64_t part = 0; part < kChannels; part += 16) {
    const int64_t first = block * kChannels + part;
    const int64_t live = std::clamp<int64_t>(channels - first, 0, 16);
    for (int64_t lane = 0; lane < live; ++lane) {
      const T* row = weight + (first + lane) * stride;
      scales[first + lane] = quantize_row(row, inputs, padded, rows.data() + lane * apart);
    }
    std::fill(rows.begin() + live * apart, rows.end(), int8_t{0});
    int8_t* target = packed + block * kChannels * padded + part * kQuad;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += kQuad) {
      const __m512i quads = _mm512_i32gather_epi32(places, rows.data() + i, 1);
      _mm512_storeu_si512(target + i * kChannels, quads);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), quads);
    }
    if (live > 0) _mm512_mask_storeu_epi32(sums + first, mask_of(live), sum);
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
void scale_tile(const Packed& weight, int64_t block, int64_t rows, const __m512i (*sums)[4], const float* x_scales,
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
      if (weight.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, weight.bias + channel));
      store(out + r * weight.channels + channel, mask, value);
    }
  }
}

template <class T>
void multiply_block(const Packed& weight, int64_t block, int64_t rows, const uint8_t* x, const float* x_scales,
                    T* out) {
  const int64_t padded = round_up(weight.inputs, kQuad);
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
    scale_tile(weight, block, live, sums, x_scales + r, out + r * weight.channels);
  }
}

template <class T>
void quantize_activations(const T* row, int64_t size, int64_t padded, uint8_t* out, float* scale) {
  *scale = quantize_row(row, size, padded, reinterpret_cast<int8_t*>(out));
  const __m512i top = _mm512_set1_epi8(-128);  // adding 128 is flipping the highest bit
  for (int64_t i = 0; i < padded; i += 64) {
    const __mmask64 mask = padded - i >= 64 ? ~0ull : (1ull << (padded - i)) - 1;
    _mm512_mask_storeu_epi8(out + i, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, out + i), top));
  }
}

template <class T>
void pack(const T* weight, int64_t stride, int64_t inputs, int64_t channels, int8_t* packed, float* scales,
          int32_t* sums) {
  share_out(torch_workers(), round_up(channels, kChannels) / kChannels, 1, [&](int64_t block) {
    pack_block(weight, stride, inputs, channels, block, packed, scales, sums);
  });
}

template <class T>
void linear(const Packed& weight, const T* x, int64_t stride, int64_t rows, T* out) {
  const int64_t padded = round_up(weight.inputs, kQuad);
  std::vector<uint8_t> quantized(rows * padded);
  std::vector<float> scales(rows);
  const Workers workers = torch_workers();
  share_out(workers, rows, 64, [&](int64_t row) {
    quantize_activations(x + row * stride, weight.inputs, padded, quantized.data() + row * padded, &scales[row]);
  });
  share_out(workers, round_up(weight.channels, kChannels) / kChannels, 1,
            [&](int64_t block) { multiply_block(weight, block, rows, quantized.data(), scales.data(), out); });
}

#pragma GCC pop_options
#else
template <class T>
void pack(const T*, int64_t, int64_t, int64_t, int8_t*, float*, int32_t*) {}
template <class T>
void linear(const Packed&, const T*, int64_t, int64_t, T*) {}
#endif

void check_common(const Checks& checks, const Tensor& dense, const char* name, const Tensor& packed,
                  const Tensor& scales, const Tensor& sums, int64_t channels) {
  checks.require(supported(), "this CPU lacks AVX-512 VNNI");
  checks.require(dense.dim() == 2 && (dense.size(1) <= 1 || dense.stride(1) == 1),
                 std::string(name) + " must be two-dimensional and contiguous in the last dimension");
  checks.require(dense.size(1) < 66000, std::string(name) + " has more columns than int32 sums can hold");
  checks.require(dense.scalar_type() == ScalarType::Float || dense.scalar_type() == ScalarType::BFloat16,
                 std::string(name) + " must be float32 or bfloat16");
  checks.vector_of<float>(scales, "scales", ScalarType::Float, "float32", channels, dense);
  checks.vector_of<int32_t>(sums, "sums", ScalarType::Int, "int32", channels, dense);
  const int64_t bytes = round_up(channels, kChannels) * round_up(dense.size(1), kQuad);
  checks.vector_of<int8_t>(packed, "packed", ScalarType::Char, "int8", bytes, dense);
}

void int8_pack(Tensor weight, Tensor packed, Tensor scales, Tensor sums) {
  const Checks checks{"int8_pack"};
  check_common(checks, weight, "weight", packed, scales, sums, weight.size(0));
  const auto run = [&](auto* data) {
    pack(data, weight.stride(0), weight.size(1), weight.size(0), static_cast<int8_t*>(packed.mutable_data_ptr()),
         static_cast<float*>(scales.mutable_data_ptr()), static_cast<int32_t*>(sums.mutable_data_ptr()));
  };
  if (weight.scalar_type() == ScalarType::Float) {
    run(static_cast<const float*>(weight.const_data_ptr()));
  } else {
    run(static_cast<const uint16_t*>(weight.const_data_ptr()));
  }
}

Tensor int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor sums, std::optional<Tensor> bias) {
  const Checks checks{"int8_linear"};
  const int64_t channels = scales.dim() == 1 ? scales.size(0) : -1;
  check_common(checks, x, "x", packed, scales, sums, channels);
  const float* added =
      bias.has_value() ? checks.vector_of<float>(*bias, "bias", ScalarType::Float, "float32", channels, x) : nullptr;
  const Packed weight{static_cast<const int8_t*>(packed.const_data_ptr()),
                      static_cast<const float*>(scales.const_data_ptr()),
                      static_cast<const int32_t*>(sums.const_data_ptr()), added, x.size(1), channels};
  Tensor out = torch::stable::new_empty(x, {x.size(0), channels}, x.scalar_type());
  if (x.scalar_type() == ScalarType::Float) {
    linear(weight, static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.size(0),
           static_cast<float*>(out.mutable_data_ptr()));
  } else {
    linear(weight, static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.size(0),
           static_cast<uint16_t*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace

// A fragment: the verifier's library defines the namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def("int8_pack(Tensor weight, Tensor(a!) packed, Tensor(b!) scales, Tensor(c!) sums) -> ()");
  library.def("int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, library) {
  library.impl("int8_pack", TORCH_BOX(&int8_pack));
  library.impl("int8_linear", TORCH_BOX(&int8_linear));
}
