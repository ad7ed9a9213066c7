// Tokens that compete for the highest score on CUDA, and how two of them are compared: by estimates in float, and exactly,
// as on the CPU, where the estimates are too close. So float64 is hardly ever needed.

#pragma once

#include <cuda_runtime.h>

#include "rule.h"

namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// What a block must know of its row.
struct Row {
  uint32_t state;
  float inverse_temperature;
  bool greedy;
};

__device__ Row row_of(const VerifyArguments& a, int64_t request, int64_t row_of_request) {
  const float temperature = a.temperature[request];
  return {row_state(a.seeds[request], a.positions[request] + row_of_request), inverse_temperature(temperature),
          is_greedy(temperature)};
}

// The best token so far. `estimate` is its score in float, off by at most slack().
struct Candidate {
  float estimate;
  float scaled;
  int32_t token;  // -1: none yet
};

// The score in float. For u above a half, 1 - u comes from the inverted hash, which keeps all its bits.
__device__ float estimate_score(float scaled, uint32_t hash) {
  const float exponential = hash < 0x80000000u ? -log1pf((__uint2float_rn(hash) + 0.5f) * -0x1p-32f)
                                               : -logf((__uint2float_rn(~hash) + 0.5f) * 0x1p-32f);
  return scaled - logf(exponential);
}

// More than an estimate can be off: the logarithms by some 1e-6, the sum by one rounding.
__device__ float slack(const Candidate& candidate) { return 1e-4f + 1e-6f * fabsf(candidate.scaled); }

// Whether `a` beats `b`: the higher exact score, the lower id on ties.
__device__ bool beats(const Candidate& a, const Candidate& b, const Row& row) {
  if (a.token < 0 || b.token < 0) return a.token >= 0;
  if (row.greedy) return a.scaled > b.scaled || (a.scaled == b.scaled && a.token < b.token);
  const float margin = slack(a) + slack(b);
  if (a.estimate > b.estimate + margin) return true;
  if (a.estimate < b.estimate - margin) return false;
  const double exact_a = score(a.scaled, row.state, static_cast<uint32_t>(a.token));
  const double exact_b = score(b.scaled, row.state, static_cast<uint32_t>(b.token));
  return exact_a > exact_b || (exact_a == exact_b && a.token < b.token);
}

__device__ Candidate shuffled_down(const Candidate& candidate, int distance) {
  return {__shfl_down_sync(kAllLanes, candidate.estimate, distance),
          __shfl_down_sync(kAllLanes, candidate.scaled, distance),
          __shfl_down_sync(kAllLanes, candidate.token, distance)};
}

}  // namespace
