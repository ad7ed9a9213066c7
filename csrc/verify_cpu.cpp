#include "verify_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "scan.h"

namespace {

// With fewer logits than this in all active rows, handing them to threads costs more than it gains.
constexpr int64_t kSerialLogits = 32768;
// Items per thread that are aimed at, so that threads finish together although some are slowed by a neighbour.
constexpr int64_t kItemsPerThread = 4;

ScanFunction choose_scan() {
#ifdef __x86_64__
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const ScanFunction with_avx512 = avx512 ? scan_avx512 : nullptr;
  const ScanFunction with_avx2 = avx2 ? scan_avx2 : nullptr;
#else
  const ScanFunction with_avx512 = nullptr, with_avx2 = nullptr;
#endif
  const char* wanted = std::getenv("MEGATRON_RL_CPU_CAPABILITY");
  if (wanted == nullptr) return with_avx512 ? with_avx512 : with_avx2 ? with_avx2 : scan_portable;
  const std::string name = wanted;
  if (name != "avx512" && name != "avx2" && name != "portable") {
    throw std::invalid_argument("MEGATRON_RL_CPU_CAPABILITY is \"" + name + "\"; use avx512, avx2 or portable");
  }
  const ScanFunction chosen = name == "avx512" ? with_avx512 : name == "avx2" ? with_avx2 : scan_portable;
  if (chosen == nullptr) {
    throw std::invalid_argument("MEGATRON_RL_CPU_CAPABILITY is \"" + name + "\", which this processor does not have");
  }
  return chosen;
}

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
  const int64_t size = a.dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(Half);
  return static_cast<const char*>(a.logits) + row * a.row_stride * size;
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
      : a_(arguments), workers_(workers), scan_(choose_scan()), tiles_((arguments.vocab + kTile - 1) / kTile) {}

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
    std::atomic<int64_t> next{0};
    const auto body = [&] {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count * shares_;) {
        scan_share(active[item / shares_], row, item / shares_, item % shares_);
      }
    };
    if (serial) {
      body();
    } else {
      workers_.run(body);
    }
  }

  void scan_share(int64_t request, int64_t row, int64_t place, int64_t share) {
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

  // Writes what the row says; whether the request goes on.
  bool emit(int64_t request, int64_t row, const RowResult& result) {
    if (result.problem != Problem::kNone) {
      refuse(a_, request, result.problem, row);
      return false;
    }
    const Verdict verdict = judge(a_, request, row, result);
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
