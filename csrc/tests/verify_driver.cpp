// Drives the CPU core without torch, for `make sanitize`: every instruction set, dtype, layout and rule, on buffers that
// end exactly where the data ends, so that the sanitizers see any access beyond. Results are compared with a plain loop.

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"
#include "problems.h"
#include "verify_cpu.h"

namespace {

// A batch of requests with 0, 1, 2, ... drafts. Every array is exactly as long as it has to be.
template <class Logit>
struct Batch {
  std::vector<int32_t> cu_rows{0}, draft_ids, tokens, num_emitted;
  std::vector<float> temperature, draft_logprobs, lenience, logprobs;
  std::vector<int64_t> seeds, positions;
  std::unique_ptr<Logit[]> logits;
  VerifyArguments arguments{};

  Batch(int64_t requests, int64_t vocab, int64_t padding, bool lenient, Random random) {
    const float temperatures[] = {1.0f, 0.0f, 0.7f, 1.3f};
    const float leniences[] = {NAN, 0.3f, INFINITY, -INFINITY, 0.0f};
    for (int64_t b = 0; b < requests; ++b) {
      cu_rows.push_back(cu_rows.back() + 1 + static_cast<int32_t>(b % 5));
      temperature.push_back(temperatures[b % 4]);
      lenience.push_back(leniences[b % 5]);
      seeds.push_back(static_cast<int64_t>(random.next()) << 32 | random.next());
      positions.push_back(random.next());
    }
    const int64_t rows = cu_rows.back(), stride = vocab + padding;
    logits = std::make_unique<Logit[]>(rows == 0 ? 0 : (rows - 1) * stride + vocab);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t v = 0; v < vocab; ++v) {
        const bool masked = v != row % vocab && random.next() % 8 == 0;
        store(&logits[row * stride + v], masked ? -INFINITY : random.between(-8, 8));
      }
    }
    for (int64_t i = 0; i < rows - requests; ++i) {
      draft_ids.push_back(static_cast<int32_t>(random.next() % vocab));
      draft_logprobs.push_back(random.between(-6, 0));
    }
    const int64_t max_rows = requests < 5 ? requests : 5;
    tokens.resize(requests * max_rows);
    logprobs.resize(requests * max_rows);
    num_emitted.resize(requests);
    arguments = {logits.get(), dtype_of<Logit>(), stride, rows, vocab, requests, cu_rows.data(), draft_ids.data(),
                 temperature.data(), seeds.data(), positions.data(), max_rows,
                 lenient ? draft_logprobs.data() : nullptr, lenient ? lenience.data() : nullptr,
                 tokens.data(), num_emitted.data(), logprobs.data()};
  }

  // The coupled sample of a row, by a plain loop over exact scores.
  RowResult sample(int64_t request, int64_t row) const {
    const Logit* at = logits.get() + row * arguments.row_stride;
    const float inverse = inverse_temperature(temperature[request]);
    const uint32_t state = row_state(seeds[request], positions[request] + row - cu_rows[request]);
    RowResult result{-1, 0, 0, Problem::kNone};
    double best = -INFINITY, sum = 0;
    for (int64_t v = 0; v < arguments.vocab; ++v) {
      const float scaled = to_float(at[v]) * inverse;
      if (scaled == -INFINITY) continue;
      sum += std::exp(static_cast<double>(scaled));
      const double value = is_greedy(temperature[request]) ? scaled : score(scaled, state, static_cast<uint32_t>(v));
      if (value > best) {
        best = value;
        result.token = static_cast<int32_t>(v);
        result.scaled = scaled;
      }
    }
    result.log_normalizer = std::log(sum);
    return result;
  }

  void check(const std::string& name) const {
    for (int64_t b = 0; b < arguments.requests; ++b) {
      bool continues = true;
      int64_t row = 0;
      for (; continues; ++row) {
        const RowResult result = sample(b, cu_rows[b] + row);
        const Verdict verdict = verify_row(arguments, b, row, result);
        const int64_t out = b * arguments.max_rows + row;
        expect(tokens[out] == verdict.token, name + ": token");
        expect(std::fabs(logprobs[out] - (verdict.scaled - result.log_normalizer)) < 1e-4, name + ": log-probability");
        continues = verdict.continues;
      }
      expect(num_emitted[b] == row, name + ": number of tokens");
      for (; row < arguments.max_rows; ++row) expect(tokens[b * arguments.max_rows + row] == -1, name + ": padding");
    }
  }
};

template <class Logit>
void run_all(const std::string& name) {
  for (const int64_t vocab : {1, 7, 8, 16, 33, 4095, 4096, 4097, 20'001}) {
    for (const int64_t padding : {0, 5}) {
      for (const bool lenient : {false, true}) {
        for (const Workers* workers : {&kAlone, &kThree}) {
          Batch<Logit> batch(vocab > 10'000 ? 6 : 20, vocab, padding, lenient, Random{static_cast<uint64_t>(vocab)});
          verify_cpu(batch.arguments, *workers);
          batch.check(name + ", vocabulary " + std::to_string(vocab));
        }
      }
    }
  }
  Batch<Logit> empty(0, 100, 0, false, Random{1});
  verify_cpu(empty.arguments, kThree);
}

// Wrong data must be reported, and must not be followed out of bounds.
void run_broken(const std::string& expected, void (*break_it)(Batch<float>&)) {
  Batch<float> batch(6, 50, 0, true, Random{9});
  break_it(batch);
  verify_cpu(batch.arguments, kAlone);
  try {
    raise_for_problems(batch.num_emitted.data(), batch.arguments.requests);
    expect(false, "no error for: " + expected);
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()).find(expected) != std::string::npos, std::string("message: ") + error.what());
  }
}

}  // namespace

int main() {
  for_each_capability([](const std::string& capability) {
    run_all<float>(capability + ", float32");
    run_all<BFloat16>(capability + ", bfloat16");
    run_all<Half>(capability + ", float16");
  });
  run_broken("holds NaN", [](Batch<float>& b) { b.logits[0] = NAN; });
  run_broken("only -inf", [](Batch<float>& b) {
    for (int v = 0; v < 50; ++v) b.logits[v] = -INFINITY;
  });
  run_broken("draft_ids", [](Batch<float>& b) { b.draft_ids[3] = 1 << 30; });
  run_broken("draft_ids", [](Batch<float>& b) { b.draft_ids[0] = -2; });
  run_broken("cu_rows", [](Batch<float>& b) { b.cu_rows[2] = 1 << 30; });
  run_broken("cu_rows", [](Batch<float>& b) { b.cu_rows[1] = -5; });
  run_broken("max_rows", [](Batch<float>& b) { b.arguments.max_rows = 2; });
  run_broken("temperature", [](Batch<float>& b) { b.temperature[5] = NAN; });
  return report();
}
