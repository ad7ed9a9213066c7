// The passes over a run of logits, for any vector type. Every logit comes from memory once.

#pragma once

#include "logprobs.h"
#include "tile.h"

namespace {

constexpr float kLowest = -87.3365f;  // exp of it is 2^-126: what lies below counts as -inf

template <class Simd>
struct Logprobs {
  using Floats = typename Simd::Floats;
  static constexpr int kWidth = Simd::kWidth;
  static constexpr int kGroup = Tile<Simd>::kGroup;

  static Moments tile_moments(const float* tile, int count, float max, const char* next) {
    Floats sum = Simd::all(0), weighted = Simd::all(0);
    for (int group = 0; group < count; group += kGroup) {
      Floats group_sum = Simd::all(0), group_weighted = Simd::all(0);
      for (int i = group; i < count && i < group + kGroup; i += kWidth) {
        Tile<Simd>::prefetch(next, i);
        // Bounded, because 0 * -inf would be NaN; NaN itself passes through.
        const Floats x = Simd::max(Simd::all(kLowest), Simd::subtract(Simd::load(tile + i), Simd::all(max)));
        const Floats e = Tile<Simd>::exponentials(x);
        group_sum = Simd::add(group_sum, e);
        group_weighted = Simd::multiply_add(e, x, group_weighted);
      }
      sum = Simd::add(sum, group_sum);
      weighted = Simd::add(weighted, group_weighted);
    }
    return {max, Simd::sum_of(sum), Simd::sum_of(weighted)};
  }

  template <class Logit>
  static Moments moments(const Run& run) {
    alignas(64) float tile[kTile];
    const Logit* logits = static_cast<const Logit*>(run.logits);
    Moments total;
    for (int64_t first = 0; first < run.count; first += kTile) {
      const int count = static_cast<int>(first + kTile <= run.count ? kTile : run.count - first);
      const char* next = first + kTile < run.count ? reinterpret_cast<const char*>(logits + first + kTile) : nullptr;
      const float max = Tile<Simd>::load(logits + first, count, run.inverse_temperature, tile);
      if (max == -INFINITY) {
        total = total + Moments{max, Tile<Simd>::has_nan(tile, count) ? NAN : 0.0, 0};
      } else {
        total = total + tile_moments(tile, count, max, next);
      }
    }
    return total;
  }

  // The scalar twin of the loop below, before `hit`.
  static float gradient_at(float scaled, const RowGradient& row) {
    const float x = scaled - row.normalizer;
    return x < kLowest ? 0 : __builtin_expf(x) * (row.constant + row.slope * x);
  }

  template <class Logit>
  static void gradient(const Run& run, const RowGradient& row, Logit* out) {
    const Logit* logits = static_cast<const Logit*>(run.logits);
    const Floats scale = Simd::all(run.inverse_temperature), normalizer = Simd::all(row.normalizer);
    const Floats constant = Simd::all(row.constant), slope = Simd::all(row.slope), lowest = Simd::all(kLowest);
    const auto scaled_at = [&](int64_t i) { return to_float(logits[i]) * run.inverse_temperature; };
    int64_t i = 0;
    for (; i + kWidth <= run.count; i += kWidth) {
      const Floats x = Simd::subtract(Simd::multiply(Simd::load(logits + i), scale), normalizer);
      const Floats change = Simd::multiply(Tile<Simd>::exponentials(x), Simd::multiply_add(slope, x, constant));
      Simd::store(out + i, Simd::zero_where_less(x, lowest, change));
    }
    for (; i < run.count; ++i) store(out + i, gradient_at(scaled_at(i), row));
    if (row.token >= 0 && row.token < run.count) {
      // Again from the start: in 16 bits the sum must be rounded once, not twice.
      store(out + row.token, gradient_at(scaled_at(row.token), row) + row.hit);
    }
  }

  static Moments moments_of(const Run& run) {
    switch (run.dtype) {
      case Dtype::kFloat32: return moments<float>(run);
      case Dtype::kBFloat16: return moments<BFloat16>(run);
      case Dtype::kFloat16: return moments<Half>(run);
    }
    __builtin_unreachable();
  }

  static void gradient_of(const Run& run, const RowGradient& row, void* out) {
    switch (run.dtype) {
      case Dtype::kFloat32: return gradient(run, row, static_cast<float*>(out));
      case Dtype::kBFloat16: return gradient(run, row, static_cast<BFloat16*>(out));
      case Dtype::kFloat16: return gradient(run, row, static_cast<Half*>(out));
    }
    __builtin_unreachable();
  }
};

}  // namespace
