#include "logprobs.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "capability.h"

namespace {

// Rows are divided into runs of this many columns: enough runs for many threads, even with few rows.
constexpr int64_t kRun = 16384;
// With fewer logits than this for a thread, handing them over costs more than it gains.
constexpr int64_t kGroupLogits = 32768;

int64_t runs_of(int64_t columns) { return (columns + kRun - 1) / kRun; }

int64_t group_of(int64_t columns) { return kGroupLogits / std::min(kRun, std::max<int64_t>(columns, 1)); }

const void* address_of(const LogprobArguments& a, int64_t row, int64_t column) {
  return static_cast<const char*>(a.logits) + (row * a.row_stride + column) * element_size(a.dtype);
}

// The columns [begin, min(end, valid)) of a row.
Run run_of(const LogprobArguments& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t count = std::max<int64_t>(std::min(end, a.valid) - begin, 0);
  return {address_of(a, row, begin), a.dtype, count, a.inverse_temperature};
}

// The row's token, or -1 where another rank holds it.
int64_t local_token(const LogprobArguments& a, int64_t row) {
  return a.tokens[row] >= 0 && a.tokens[row] < a.valid ? a.tokens[row] : -1;
}

float scaled_logit(const LogprobArguments& a, int64_t row, int64_t column) {
  const void* at = address_of(a, row, column);
  switch (a.dtype) {
    case Dtype::kFloat32: return to_float(*static_cast<const float*>(at)) * a.inverse_temperature;
    case Dtype::kBFloat16: return to_float(*static_cast<const BFloat16*>(at)) * a.inverse_temperature;
    case Dtype::kFloat16: return to_float(*static_cast<const Half*>(at)) * a.inverse_temperature;
  }
  __builtin_unreachable();
}

// d logprob / d x = onehot - p, and d entropy / d x = -p (log p + entropy), with log p = x - normalizer.
RowGradient row_gradient(const LogprobArguments& a, const UpstreamGradients& upstream, int64_t row) {
  RowGradient result{upstream.normalizers[row], 0, 0, 0, local_token(a, row)};
  if (upstream.logprobs != nullptr) {
    result.hit = upstream.logprobs[row] * a.inverse_temperature;
    result.constant = -result.hit;
  }
  if (upstream.entropy != nullptr) {
    result.slope = -upstream.entropy[row] * a.inverse_temperature;
    result.constant += result.slope * upstream.entropies[row];
  }
  return result;
}

}  // namespace

void logprob_sums_cpu(const LogprobArguments& a, float* maxima, float* sums, const Workers& workers) {
  const MomentsFunction moments_of = FOR_THIS_CPU(moments);
  const int64_t runs = runs_of(a.valid);
  std::vector<Moments> parts(a.rows * runs);
  share_out(workers, a.rows * runs, group_of(a.valid), [&](int64_t item) {
    const int64_t row = item / runs, begin = item % runs * kRun;
    parts[item] = moments_of(run_of(a, row, begin, begin + kRun));
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    Moments total;
    for (int64_t run = 0; run < runs; ++run) total = total + parts[row * runs + run];
    const int64_t token = local_token(a, row);
    maxima[row] = static_cast<float>(total.max);
    sums[row] = static_cast<float>(total.sum);
    sums[a.rows + row] = static_cast<float>(total.weighted);
    sums[2 * a.rows + row] = token < 0 ? 0.0f : scaled_logit(a, row, token);
  }
}

void logprob_gradient_cpu(const LogprobArguments& a, const UpstreamGradients& upstream, void* out,
                          const Workers& workers) {
  const GradientFunction gradient_of = FOR_THIS_CPU(gradient);
  const int64_t runs = runs_of(a.width), size = element_size(a.dtype);
  share_out(workers, a.rows * runs, group_of(a.width), [&](int64_t item) {
    const int64_t row = item / runs, begin = item % runs * kRun, end = std::min(begin + kRun, a.width);
    const Run run = run_of(a, row, begin, end);
    RowGradient gradient = row_gradient(a, upstream, row);
    gradient.token -= begin;
    char* target = static_cast<char*>(out) + (row * a.width + begin) * size;
    gradient_of(run, gradient, target);
    std::memset(target + run.count * size, 0, (end - begin - run.count) * size);
  });
}
