// The dtypes of logits, and 16-bit floats as plain C++: the core knows nothing of torch.

#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

namespace {

HOST_DEVICE float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

HOST_DEVICE float to_float(float x) { return x; }

HOST_DEVICE float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

HOST_DEVICE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return float_from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);  // inf, NaN
  // As float32, with the exponent still 112 too small; multiplying puts it right for denormals as well.
  const float value = float_from_bits(magnitude << 13) * 0x1p112f;
  return sign ? -value : value;
}

HOST_DEVICE int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(Half); }

HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Conversions to the type of `out`, to the nearest, ties to even.
HOST_DEVICE void store(float* out, float x) { *out = x; }

HOST_DEVICE void store(BFloat16* out, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
  out->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded >> 16);
}

HOST_DEVICE void store(Half* out, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00;  // NaN
  } else if (magnitude >= 0x47800000) {
    half = 0x7C00;  // 65,536 and more
  } else if (magnitude < 0x38800000) {
    // Denormal in half precision: float32 numbers from 0.5 to 1 have the same spacing, so the sum rounds.
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3F000000;
  } else {
    half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
