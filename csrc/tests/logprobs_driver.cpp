// Drives the log-probabilities without torch, for `make sanitize`: every instruction set, dtype and layout, on buffers
// that end exactly where the data ends, so that the sanitizers see any access beyond. Results are compared with a plain
// loop.

#include "logprobs.h"

#include <memory>
#include <string>
#include <vector>

#include "driver.h"

namespace {

// A distance of so many units in the last place of 1, for numbers around 1 and below.
template <class Logit>
constexpr double kTolerance = std::is_same_v<Logit, float> ? 1e-5 : std::is_same_v<Logit, Half> ? 1e-3 : 8e-3;

// Every array is exactly as long as it has to be.
template <class Logit>
struct Batch {
  static constexpr float kInverse = 1.3f;
  std::unique_ptr<Logit[]> logits, gradient;
  std::vector<int64_t> tokens;
  std::vector<float> maxima, sums, normalizers, entropies, for_logprobs, for_entropies;
  LogprobArguments arguments{};

  Batch(int64_t rows, int64_t width, int64_t valid, int64_t padding, Random random) {
    const int64_t stride = width + padding, length = (rows - 1) * stride + valid;
    // Columns from `valid` on are never read, so the last row has none.
    logits = std::make_unique<Logit[]>(length > 0 ? length : 0);
    gradient = std::make_unique<Logit[]>(rows * width);
    for (int64_t i = 0; i < length; ++i) {
      const bool masked = i % stride != 0 && random.next() % 8 == 0;
      store(&logits[i], masked ? -INFINITY : random.between(-8, 8));
    }
    const int64_t elsewhere[] = {-1, INT64_MIN, INT64_MAX, valid};
    for (int64_t row = 0; row < rows; ++row) {
      tokens.push_back(row % 3 == 2 || valid == 0 ? elsewhere[row % 4] : random.next() % valid);
      for_logprobs.push_back(random.between(-1, 1));
      for_entropies.push_back(random.between(-1, 1));
    }
    for (std::vector<float>* each : {&maxima, &normalizers, &entropies}) each->resize(rows);
    sums.resize(3 * rows);
    arguments = {logits.get(), dtype_of<Logit>(), stride, rows, width, valid, tokens.data(), kInverse};
  }

  float scaled(int64_t row, int64_t column) const {
    return to_float(logits[row * arguments.row_stride + column]) * kInverse;
  }

  bool has(int64_t row) const { return tokens[row] >= 0 && tokens[row] < arguments.valid; }

  void check_sums(const std::string& name) {
    for (int64_t row = 0; row < arguments.rows; ++row) {
      double max = -INFINITY, sum = 0, weighted = 0;
      for (int64_t v = 0; v < arguments.valid; ++v) max = std::fmax(max, scaled(row, v));
      for (int64_t v = 0; v < arguments.valid; ++v) {
        const double x = scaled(row, v) - max, e = std::exp(x);
        sum += e;
        weighted += e == 0 ? 0 : e * x;
      }
      const int64_t rows = arguments.rows;
      expect(maxima[row] == static_cast<float>(max), name + ": maximum");
      expect(std::fabs(sums[row] - sum) <= 1e-6 * sum, name + ": sum");
      expect(std::fabs(sums[rows + row] - weighted) <= 1e-30 - 2e-6 * weighted, name + ": weighted sum");
      expect(sums[2 * rows + row] == (has(row) ? scaled(row, tokens[row]) : 0), name + ": token");
      normalizers[row] = static_cast<float>(max + std::log(sum));
      entropies[row] = static_cast<float>(std::log(sum) - weighted / sum);
    }
  }

  void check_gradient(const std::string& name, const UpstreamGradients& upstream) const {
    for (int64_t row = 0; row < arguments.rows; ++row) {
      for (int64_t v = 0; v < arguments.width; ++v) {
        double expected = 0;
        if (v < arguments.valid && scaled(row, v) > -INFINITY) {
          const double x = static_cast<double>(scaled(row, v)) - normalizers[row], p = std::exp(x);
          if (upstream.logprobs != nullptr) expected += upstream.logprobs[row] * ((v == tokens[row] ? 1 : 0) - p);
          if (upstream.entropy != nullptr) expected -= upstream.entropy[row] * p * (x + entropies[row]);
        } else if (v == tokens[row] && has(row) && upstream.logprobs != nullptr) {
          expected = upstream.logprobs[row];
        }
        const double error = std::fabs(to_float(gradient[row * arguments.width + v]) - kInverse * expected);
        expect(error <= kTolerance<Logit>, name + ": gradient");
      }
    }
  }

  void run(const std::string& name, const Workers& workers) {
    logprob_sums_cpu(arguments, maxima.data(), sums.data(), workers);
    check_sums(name);
    for (const float* logprobs : {static_cast<const float*>(nullptr), static_cast<const float*>(for_logprobs.data())}) {
      for (const float* entropy : {static_cast<const float*>(nullptr), static_cast<const float*>(for_entropies.data())}) {
        const UpstreamGradients upstream{normalizers.data(), entropies.data(), logprobs, entropy};
        logprob_gradient_cpu(arguments, upstream, gradient.get(), workers);
        check_gradient(name, upstream);
      }
    }
  }
};

template <class Logit>
void run_all(const std::string& name) {
  for (const int64_t width : {1, 7, 8, 16, 33, 4096, 4097, 16'384, 40'001}) {
    for (const int64_t valid : {width, width - 1, width / 2, int64_t{0}}) {
      for (const Workers* workers : {&kAlone, &kThree}) {
        Batch<Logit> batch(width > 10'000 ? 5 : 20, width, valid, width % 3, Random{static_cast<uint64_t>(width)});
        batch.run(name + ", " + std::to_string(valid) + " of " + std::to_string(width) + " columns", *workers);
      }
    }
  }
  Batch<Logit>(0, 100, 100, 0, Random{1}).run(name + ", no rows", kThree);
}

}  // namespace

int main() {
  for_each_capability([](const std::string& capability) {
    run_all<float>(capability + ", float32");
    run_all<BFloat16>(capability + ", bfloat16");
    run_all<Half>(capability + ", float16");
  });
  return report();
}
