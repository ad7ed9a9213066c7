// One pass over a row of logits on the CPU: the largest noisy logit and the sum of exponentials, tile by tile.
//
// A tile is scaled into a buffer that stays in the L1 cache while its maximum is found, and is then gone through once
// more for everything else, while the next tile is fetched. So every logit comes from memory once.

#pragma once

#include <cstdint>

#include "rule.h"
#include "tile.h"

// The sum of exponentials of one tile: sum = sum over the tile of exp(scaled - max).
// Sums are kept per tile and added in the order of the tiles, so that a log-probability does not depend on how many
// threads or items have shared a row.
struct TileSum {
  float max;
  float sum;
};

struct Best {
  double score = -INFINITY;
  int32_t token = -1;
  float scaled = 0;
};

struct RowView {
  const void* logits;  // the row, [vocab]
  Dtype dtype;
  int64_t vocab;
  float inverse_temperature;
  bool greedy;
  uint32_t state;  // row_state(seed, position)
};

// Goes over the tiles [begin, end) of a row, writes sums[begin .. end), and returns the best token among them: the one
// with the highest score, the lowest id on ties. NaN and +inf make a tile's sum NaN or its maximum +inf.
using ScanFunction = Best (*)(const RowView& row, int64_t begin, int64_t end, TileSum* sums);

Best scan_portable(const RowView& row, int64_t begin, int64_t end, TileSum* sums);
Best scan_avx2(const RowView& row, int64_t begin, int64_t end, TileSum* sums);
Best scan_avx512(const RowView& row, int64_t begin, int64_t end, TileSum* sums);

namespace {

template <class Simd>
struct Scan {
  using Floats = typename Simd::Floats;
  using Words = typename Simd::Words;
  static constexpr int kWidth = Simd::kWidth;
  static constexpr int kGroup = Tile<Simd>::kGroup;

  static Floats exponentials(const float* tile, float max) {
    return Tile<Simd>::exponentials(Simd::subtract(Simd::load(tile), Simd::all(max)));
  }

  static float sum_tile(const float* tile, int count, float max, const char* next) {
    Floats sum = Simd::all(0);
    for (int group = 0; group < count; group += kGroup) {
      Floats group_sum = Simd::all(0);
      for (int i = group; i < count && i < group + kGroup; i += kWidth) {
        Tile<Simd>::prefetch(next, i);
        group_sum = Simd::add(group_sum, exponentials(tile + i, max));
      }
      sum = Simd::add(sum, group_sum);
    }
    return Simd::sum_of(sum);
  }

  // As sum_tile, and updates `best`. Only the tokens that pass survival_factor's test get an exact score.
  static float sample_tile(const float* tile, int count, float max, const char* next, uint32_t state, int64_t first_id,
                           Best& best) {
    // The hash arrives in units of Simd::kHashUnit, so the right-hand side of the test does as well.
    const Floats slack = Simd::all(kLastStep / Simd::kHashUnit);
    Floats factor = Simd::all(survival_factor(max, static_cast<float>(best.score)) / Simd::kHashUnit);
    const Words row(state);
    const Words step(kWidth * kMurmurC1);
    Words id_product = Simd::consecutive(static_cast<uint32_t>(first_id)) * Words(kMurmurC1);
    Floats sum = Simd::all(0);
    for (int group = 0; group < count; group += kGroup) {
      Floats group_sum = Simd::all(0);
      for (int i = group; i < count && i < group + kGroup; i += kWidth) {
        Tile<Simd>::prefetch(next, i);
        const Floats e = exponentials(tile + i, max);
        group_sum = Simd::add(group_sum, e);
        const Words hash = mix_but_last(absorb(row, scramble_product(id_product)));
        id_product = id_product + step;
        const uint32_t lanes = Simd::less(Simd::to_floats(hash), Simd::multiply_add(e, factor, slack));
        if (__builtin_expect(lanes != 0, 0)) {
          consider_lanes(lanes, tile + i, state, first_id + i, best);
          factor = Simd::all(survival_factor(max, static_cast<float>(best.score)) / Simd::kHashUnit);
        }
      }
      sum = Simd::add(sum, group_sum);
    }
    return Simd::sum_of(sum);
  }

  static void consider_lanes(uint32_t lanes, const float* scaled, uint32_t state, int64_t first_id, Best& best) {
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (scaled[lane] == -INFINITY) continue;
      const auto token = static_cast<uint32_t>(first_id + lane);
      const double value = score(scaled[lane], state, token);
      if (value > best.score) best = {value, static_cast<int32_t>(token), scaled[lane]};
    }
  }

  static void consider_greedily(const float* tile, int count, float max, int64_t first_id, Best& best) {
    if (!(max > best.score)) return;
    for (int i = 0; i < count; ++i) {
      if (tile[i] == max) {
        best = {max, static_cast<int32_t>(first_id + i), max};
        return;
      }
    }
  }

  template <class Logit>
  static Best scan(const RowView& row, int64_t begin, int64_t end, TileSum* sums) {
    alignas(64) float tile[kTile];
    const Logit* logits = static_cast<const Logit*>(row.logits);
    Best best;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kTile;
      const int count = static_cast<int>(first + kTile <= row.vocab ? kTile : row.vocab - first);
      const char* next = t + 1 < end ? reinterpret_cast<const char*>(logits + first + kTile) : nullptr;
      const float max = Tile<Simd>::load(logits + first, count, row.inverse_temperature, tile);
      if (max == -INFINITY || max == INFINITY) {
        // Wholly masked out, or an error: nothing to sum, and infinities would only make NaN.
        sums[t] = {max, Tile<Simd>::has_nan(tile, count) ? NAN : 0.0f};
        continue;
      }
      if (row.greedy) {
        consider_greedily(tile, count, max, first, best);
      }
      // No hash is below 0.5: a tile whose largest logit is that far from the best needs no noise at all.
      const bool no_noise = row.greedy || survival_factor(max, static_cast<float>(best.score)) < 0.5f;
      sums[t].max = max;
      sums[t].sum = no_noise ? sum_tile(tile, count, max, next)
                             : sample_tile(tile, count, max, next, row.state, first, best);
    }
    return best;
  }

  static Best scan_row(const RowView& row, int64_t begin, int64_t end, TileSum* sums) {
    switch (row.dtype) {
      case Dtype::kFloat32: return scan<float>(row, begin, end, sums);
      case Dtype::kBFloat16: return scan<BFloat16>(row, begin, end, sums);
      case Dtype::kFloat16: return scan<Half>(row, begin, end, sums);
    }
    __builtin_unreachable();
  }
};

}  // namespace
