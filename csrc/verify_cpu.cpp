#include "verify_cpu.h"

#include <algorithm>
#include <vector>

#include "capability.h"
#include "scan.h"

namespace {

// With fewer logits than this in all active rows, handing them to threads costs more than it gains.
constexpr int64_t kSerialLogits = 32768;
// Items per thread that are aimed at, so that threads finish together although some are slowed by a neighbour.
constexpr int64_t kItemsPerThread = 4;

bool cu_rows_are_consistent(const VerifyArguments& a) {
  if (a.cu_rows[0] != 0 || a.cu_rows[a.requests] != a.rows) return false;
  for (int64_t b = 0; b < a.requests; ++b) {
    if (a.cu_rows[b + 1] <= a.cu_rows[b]) return false;
  }
  return true;
}

// Writes the outputs of a request that has a problem, whatever it has emitted before.
void refuse(const VerifyArguments& a, int64_t request, Problem problem, int64_t row) {
  std::fill_n(a.tokens + request * a.max_rows, a.max_rows, -1);
  std::fill_n(a.logprobs + request * a.max_rows, a.max_rows, 0.0f);
  a.num_emitted[request] = encode_problem(problem, row);
}

// Looks at everything about a request but its logits; false and refused when something is wrong.
bool check_request(const VerifyArguments& a, int64_t request) {
  const int64_t first = a.cu_rows[request], rows = a.cu_rows[request + 1] - first;
  Problem problem = check_temperature(a.temperature[request]);
  if (problem == Problem::kNone && rows > a.max_rows) problem = Problem::kMaxRows;
  int64_t row = 0;
  while (problem == Problem::kNone && row < rows - 1) {
    problem = check_draft(a, request, first - request + row);
    if (problem == Problem::kNone) ++row;
  }
  if (problem == Problem::kNone) return true;
  refuse(a, request, problem, row);
  return false;
}

const void* address_of_row(const VerifyArguments& a, int64_t row) {
  return static_cast<const char*>(a.logits) + row * a.row_stride * element_size(a.dtype);
}

RowResult combine(const TileSum* sums, int64_t tiles, const Best* bests, int64_t shares) {
  float max = -INFINITY;
  bool nan = false;
  for (int64_t t = 0; t < tiles; ++t) {
    max = std::max(max, sums[t].max);
    nan = nan || is_nan(sums[t].sum);
  }
  RowResult result{-1, 0, 0, Problem::kNone};
  if (max == INFINITY || nan || max == -INFINITY) {
    result.problem = max == INFINITY ? Problem::kInfiniteLogits : nan ? Problem::kNanLogits : Problem::kNothingToSample;
    return result;
  }
  double sum = 0;
  for (int64_t t = 0; t < tiles; ++t) sum += sums[t].sum * std::exp(static_cast<double>(sums[t].max) - max);
  result.log_normalizer = max + std::log(sum);
  Best best;
  for (int64_t share = 0; share < shares; ++share) {
    if (bests[share].score > best.score) best = bests[share];  // on a tie the earlier share has the lower id
  }
  result.token = best.token;
  result.scaled = best.scaled;
  return result;
}

// Reads row after row of all requests that are still going on. Rows with the same number are read together, each
// divided into shares when there are fewer of them than threads; a request that has stopped costs nothing more.
class Walk {
 public:
  Walk(const VerifyArguments& arguments, const Workers& workers)
      : a_(arguments), workers_(workers), scan_(FOR_THIS_CPU(scan)), tiles_((arguments.vocab + kTile - 1) / kTile) {}

  void run(std::vector<int64_t> active) {
    for (int64_t row = 0; !active.empty(); ++row) {
      scan_rows(active, row);
      std::size_t kept = 0;
      for (std::size_t i = 0; i < active.size(); ++i) {
        if (emit(active[i], row, result_of(i))) active[kept++] = active[i];
      }
      active.resize(kept);
    }
  }

 private:
  void scan_rows(const std::vector<int64_t>& active, int64_t row) {
    const int64_t count = static_cast<int64_t>(active.size());
    const bool serial = workers_.count == 1 || count * a_.vocab <= kSerialLogits;
    shares_ = serial ? 1 : std::min(tiles_, (kItemsPerThread * workers_.count + count - 1) / count);
    sums_.resize(count * tiles_);
    bests_.resize(count * shares_);
    const int64_t items = count * shares_;
    share_out(workers_, items, serial ? items : 1, [&](int64_t item) {
      scan_fraction(active[item / shares_], row, item / shares_, item % shares_);
    });
  }

  void scan_fraction(int64_t request, int64_t row, int64_t place, int64_t share) {
    const float temperature = a_.temperature[request];
    const RowView view{address_of_row(a_, a_.cu_rows[request] + row),
                       a_.dtype,
                       a_.vocab,
                       inverse_temperature(temperature),
                       is_greedy(temperature),
                       row_state(a_.seeds[request], a_.positions[request] + row)};
    bests_[place * shares_ + share] =
        scan_(view, tiles_ * share / shares_, tiles_ * (share + 1) / shares_, &sums_[place * tiles_]);
  }

  RowResult result_of(int64_t place) const {
    return combine(&sums_[place * tiles_], tiles_, &bests_[place * shares_], shares_);
  }

  // Writes the result of the row; returns whether the request continues.
  bool emit(int64_t request, int64_t row, const RowResult& result) {
    if (result.problem != Problem::kNone) {
      refuse(a_, request, result.problem, row);
      return false;
    }
    const Verdict verdict = verify_row(a_, request, row, result);
    const int64_t out = request * a_.max_rows + row;
    a_.tokens[out] = verdict.token;
    a_.logprobs[out] = static_cast<float>(verdict.scaled - result.log_normalizer);
    a_.num_emitted[request] = static_cast<int32_t>(row) + 1;
    return verdict.continues;
  }

  const VerifyArguments& a_;
  const Workers& workers_;
  const ScanFunction scan_;
  const int64_t tiles_;
  int64_t shares_ = 1;
  std::vector<TileSum> sums_;
  std::vector<Best> bests_;
};

}  // namespace

void verify_cpu(const VerifyArguments& arguments, const Workers& workers) {
  std::fill_n(arguments.tokens, arguments.requests * arguments.max_rows, -1);
  std::fill_n(arguments.logprobs, arguments.requests * arguments.max_rows, 0.0f);
  Walk walk(arguments, workers);
  std::vector<int64_t> active;
  const bool consistent = cu_rows_are_consistent(arguments);
  for (int64_t request = 0; request < arguments.requests; ++request) {
    if (!consistent) {
      refuse(arguments, request, Problem::kCuRows, 0);
    } else if (check_request(arguments, request)) {
      active.push_back(request);
    }
  }
  walk.run(std::move(active));
}
