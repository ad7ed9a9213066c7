// 16-bit floats as plain C++: the core knows nothing of torch.

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

}  // namespace
