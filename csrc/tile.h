// What the passes over logits share: a tile in the L1 cache, and exponentials, for any vector type.
//
// `Simd` (simd_avx512.h, simd_avx2.h, simd_portable.h) wraps the vectors of an instruction set.

#pragma once

#include <cstddef>
#include <cstdint>

#include "half.h"
#include "noise.h"

constexpr int64_t kTile = 4096;

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kExp2[] = {0.999999925f, 0.693153073f,   0.240153617f,
                           0.055826318f, 0.00898934013f, 0.00187757666f};  // minimax for 2^f on [0, 1), 8e-8

template <class Simd>
struct Tile {
  using Floats = typename Simd::Floats;
  static constexpr int kWidth = Simd::kWidth;
  // Exponentials are summed in groups: thousands of small ones added to a large one would lose all their low bits.
  static constexpr int kGroup = 16 * kWidth;
  static_assert(kTile % kWidth == 0);

  // Scales `count` logits into `tile`, fills up to a whole vector with -inf, and returns the maximum (NaN left aside).
  template <class Logit>
  static float load(const Logit* logits, int count, float inverse_temperature, float* tile) {
    const Floats scale = Simd::all(inverse_temperature);
    Floats max = Simd::all(-INFINITY);
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const Floats x = Simd::multiply(Simd::load(logits + i), scale);
      Simd::store(tile + i, x);
      max = Simd::max(x, max);
    }
    if (i < count) {
      for (int j = i; j < i + kWidth; ++j) {
        tile[j] = j < count ? to_float(logits[j]) * inverse_temperature : -INFINITY;
      }
      max = Simd::max(Simd::load(tile + i), max);
    }
    return Simd::max_of(max);
  }

  // exp(x) for x <= 0. Far below 0 it stays at 2^-126: as good as 0, and never denormal.
  static Floats exponentials(Floats x) {
    const Floats t = Simd::max(Simd::all(-126.0f), Simd::multiply(x, Simd::all(kLog2E)));
    const Floats f = Simd::fraction(t);
    Floats power = Simd::all(kExp2[5]);
    for (int i = 4; i >= 0; --i) power = Simd::multiply_add(power, f, Simd::all(kExp2[i]));
    return Simd::times_power_of_floor(power, t);
  }

  static bool has_nan(const float* tile, int count) {
    for (int i = 0; i < count; ++i) {
      if (is_nan(tile[i])) return true;
    }
    return false;
  }

  static void prefetch(const char* next, int i) {
    if (next != nullptr) __builtin_prefetch(next + static_cast<std::ptrdiff_t>(i) * 4);
  }
};

}  // namespace
