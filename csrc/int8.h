// Linear layers in W8A8 on CPUs with AVX-512 VNNI, without torch; documented in rollout/quantization/int8.py.

#pragma once

#include <cstdint>

#include "half.h"
#include "workers.h"

constexpr int64_t kInt8Channels = 64;  // output channels of a block: four vectors of 16
constexpr int64_t kInt8Quad = 4;       // inputs that one instruction adds up

struct Int8Weight {
  int8_t* blocks;  // `int8_bytes` of them
  float* scales;   // [channels]
  int32_t* sums;   // [channels], of each channel's int8 weights
  int64_t inputs, channels;
};

// What rounding does to the weights of a block: squares of the differences and of the weights, and how many are clipped.
struct Int8Rounding {
  double error = 0, norm = 0, clipped = 0;
};

// Rows of a matrix, float32 or bfloat16.
struct Int8Rows {
  const void* data;
  Dtype dtype;
  int64_t stride;        // in elements
  int64_t rows;
  const float* factors;  // [columns], multiply each row first; or nullptr
};

constexpr int64_t int8_round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t int8_blocks(int64_t channels) { return int8_round_up(channels, kInt8Channels) / kInt8Channels; }
constexpr int64_t int8_bytes(int64_t inputs, int64_t channels) {
  return int8_blocks(channels) * kInt8Channels * int8_round_up(inputs, kInt8Quad);
}

// Whether this processor has the instructions.
bool int8_supported();

// Quantizes the rows of `from` into `to`; the largest weight of a channel is `clip` of the largest there. Fills
// `rounding`, one per block.
void int8_pack_cpu(const Int8Rows& from, float clip, const Int8Weight& to, Int8Rounding* rounding,
                   const Workers& workers);

// Fills `out` [rows, channels], of the dtype of x; `bias` is [channels] or nullptr.
void int8_linear_cpu(const Int8Rows& x, const Int8Weight& weight, const float* bias, void* out,
                     const Workers& workers);
