// Log-probabilities of given tokens on the CPU, without torch: the sums they are made of, and their gradient.
//
// megatron_rl/models/vocab_parallel_logprobs.py documents the operators. Work is divided into runs of columns whose
// borders depend on nothing but the shape, so results do not depend on the number of threads.

#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"
#include "workers.h"

struct LogprobArguments {
  const void* logits;  // [rows, width]
  Dtype dtype;
  int64_t row_stride;  // in elements
  int64_t rows;
  int64_t width;
  int64_t valid;          // columns that count
  const int64_t* tokens;  // [rows]; outside [0, valid) nothing is picked
  float inverse_temperature;
};

struct UpstreamGradients {
  const float* normalizers;  // [rows], log sum exp(logits / temperature), of the whole vocabulary
  const float* entropies;    // [rows], likewise
  const float* logprobs;     // [rows], null where the log-probabilities have no gradient
  const float* entropy;      // [rows], null where the entropies have no gradient
};

// Fills maxima [rows] and sums [3, rows].
void logprob_sums_cpu(const LogprobArguments& arguments, float* maxima, float* sums, const Workers& workers);

// Fills `out` [rows, width], of the dtype of the logits.
void logprob_gradient_cpu(const LogprobArguments& arguments, const UpstreamGradients& upstream, void* out,
                          const Workers& workers);

// What follows is between logprobs_cpu.cpp and the code for each instruction set.

// Some neighbouring logits of a row.
struct Run {
  const void* logits;
  Dtype dtype;
  int64_t count;
  float inverse_temperature;
};

// Of scaled logits x: sum exp(x - max), and sum exp(x - max) (x - max). Relative to the maximum, not to 0: the entropy
// is the difference of two logarithms, and would otherwise lose as many digits as x is large.
struct Moments {
  double max = -INFINITY;
  double sum = 0;  // NaN if a logit is NaN or +inf
  double weighted = 0;
};

// d x = exp(x - normalizer) (constant + slope (x - normalizer)); at -inf it is 0. `hit` is added at `token`, if that
// is in the run.
struct RowGradient {
  float normalizer;
  float constant;
  float slope;
  float hit;
  int64_t token;
};

using MomentsFunction = Moments (*)(const Run& run);
Moments moments_portable(const Run& run);
Moments moments_avx2(const Run& run);
Moments moments_avx512(const Run& run);

using GradientFunction = void (*)(const Run& run, const RowGradient& row, void* out);
void gradient_portable(const Run& run, const RowGradient& row, void* out);
void gradient_avx2(const Run& run, const RowGradient& row, void* out);
void gradient_avx512(const Run& run, const RowGradient& row, void* out);

namespace {

inline Moments relative_to(const Moments& m, double max) {
  if (m.max == max) return m;                      // infinities too: their difference would be NaN
  if (m.max == -INFINITY) return {max, m.sum, 0};  // nothing to weigh: the sum is 0, or NaN
  const double shift = m.max - max, weight = __builtin_exp(shift);
  return {max, weight * m.sum, weight * (m.weighted + m.sum * shift)};
}

inline Moments operator+(const Moments& a, const Moments& b) {
  const double max = a.max > b.max ? a.max : b.max;
  const Moments left = relative_to(a, max), right = relative_to(b, max);
  return {max, left.sum + right.sum, left.weighted + right.weighted};
}

}  // namespace
