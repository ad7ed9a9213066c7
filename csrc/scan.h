// One pass over a row of logits on the CPU: the largest noisy logit and the sum of exponentials, tile by tile.
//
// `Simd` (simd_avx512.h, simd_avx2.h, simd_portable.h) wraps the vectors of an instruction set; this is the algorithm.
// A tile is scaled into a buffer that stays in the L1 cache while its maximum is found, and is then gone through once
// more for everything else, while the next tile is fetched. So every logit comes from memory once.

#pragma once

#include <cstddef>
#include <cstdint>

#include "half.h"
#include "rule.h"

constexpr int64_t kTile = 4096;

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

constexpr float kLog2E = 1.44269504f;
constexpr float kExp2[] = {0.999999925f, 0.693153073f,   0.240153617f,
                           0.055826318f, 0.00898934013f, 0.00187757666f};  // minimax for 2^f on [0, 1), 8e-8

template <class Simd>
struct Scan {
  using Floats = typename Simd::Floats;
  using Words = typename Simd::Words;
  static constexpr int kWidth = Simd::kWidth;
  // Exponentials are summed in groups: thousands of small ones added to a large one would lose all their low bits.
  static constexpr int kGroup = 16 * kWidth;
  static_assert(kTile % kWidth == 0);

  // Scales `count` logits into `tile`, fills up to a whole vector with -inf, and returns the maximum (NaN left aside).
  template <class Logit>
  static float load_tile(const Logit* logits, int count, float inverse_temperature, float* tile) {
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

  // exp(tile - max), for tile <= max. Far below the maximum it stays at 2^-126: as good as 0, and never denormal.
  static Floats exponentials(const float* tile, Floats max) {
    const Floats exponent = Simd::multiply(Simd::subtract(Simd::load(tile), max), Simd::all(kLog2E));
    const Floats t = Simd::max(Simd::all(-126.0f), exponent);
    const Floats f = Simd::fraction(t);
    Floats power = Simd::all(kExp2[5]);
    for (int i = 4; i >= 0; --i) power = Simd::multiply_add(power, f, Simd::all(kExp2[i]));
    return Simd::times_power_of_floor(power, t);
  }

  static float sum_tile(const float* tile, int count, float max, const char* next) {
    Floats sum = Simd::all(0);
    for (int group = 0; group < count; group += kGroup) {
      Floats group_sum = Simd::all(0);
      for (int i = group; i < count && i < group + kGroup; i += kWidth) {
        prefetch(next, i);
        group_sum = Simd::add(group_sum, exponentials(tile + i, Simd::all(max)));
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
        prefetch(next, i);
        const Floats e = exponentials(tile + i, Simd::all(max));
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

  static bool has_nan(const float* tile, int count) {
    for (int i = 0; i < count; ++i) {
      if (is_nan(tile[i])) return true;
    }
    return false;
  }

  static void prefetch(const char* next, int i) {
    if (next != nullptr) __builtin_prefetch(next + static_cast<std::ptrdiff_t>(i) * 4);
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
      const float max = load_tile(logits + first, count, row.inverse_temperature, tile);
      if (max == -INFINITY || max == INFINITY) {
        // Wholly masked out, or an error: nothing to sum, and infinities would only make NaN.
        sums[t] = {max, has_nan(tile, count) ? NAN : 0.0f};
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
