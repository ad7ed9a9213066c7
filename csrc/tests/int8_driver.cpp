// Drives the int8 linear layers without torch, for `make sanitize`: dtypes, layouts, smoothing and clipping, on buffers
// that end exactly where the data ends, so that the sanitizers see any access beyond. Results are compared with a plain
// loop, bit by bit.

#include "int8.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"

namespace {

// Rows that lie apart; the array ends with the last one.
template <class T>
struct Matrix {
  int64_t rows, columns, stride;
  std::unique_ptr<T[]> data;

  Matrix(int64_t rows, int64_t columns, int64_t padding, Random& random)
      : rows(rows), columns(columns), stride(columns + padding) {
    const int64_t length = rows > 0 ? (rows - 1) * stride + columns : 0;
    data = std::make_unique<T[]>(length);
    for (int64_t i = 0; i < length; ++i) store(&data[i], i / stride == 1 ? 0 : random.between(-3, 3));
  }

  Int8Rows view(const float* factors) const { return {data.get(), dtype_of<T>(), stride, rows, factors}; }
};

struct Quantized {
  std::vector<int> levels;
  float scale;
};

template <class T>
Quantized quantized(const Matrix<T>& matrix, int64_t row, const float* factors, float clip) {
  std::vector<float> values(matrix.columns);
  float largest = 0;
  for (int64_t i = 0; i < matrix.columns; ++i) {
    values[i] = to_float(matrix.data[row * matrix.stride + i]);
    if (factors != nullptr) values[i] *= factors[i];
    largest = std::fmax(largest, std::fabs(values[i]));
  }
  const float limit = clip * largest, inverse = limit > 0 ? 127.0f / limit : 0.0f;
  Quantized result{{}, limit / 127.0f};
  for (const float value : values) {
    result.levels.push_back(std::clamp(static_cast<int>(std::nearbyint(value * inverse)), -127, 127));
  }
  return result;
}

template <class T>
void run(const std::string& name, int64_t rows, int64_t channels, int64_t inputs, float clip, bool smooth,
         const Workers& workers) {
  Random random{static_cast<uint64_t>(channels * 1000 + inputs)};
  const Matrix<T> weight(channels, inputs, inputs % 3, random), x(rows, inputs, channels % 2, random);
  std::vector<float> smoothing, factors, bias(channels);
  for (int64_t i = 0; smooth && i < inputs; ++i) {
    smoothing.push_back(random.between(0.1f, 5));
    factors.push_back(1 / smoothing.back());
  }
  for (float& value : bias) value = random.between(-1, 1);
  const auto blocks = std::make_unique<int8_t[]>(int8_bytes(inputs, channels));
  const auto scales = std::make_unique<float[]>(channels);
  const auto sums = std::make_unique<int32_t[]>(channels);
  const auto rounding = std::make_unique<Int8Rounding[]>(int8_blocks(channels));
  const Int8Weight packed{blocks.get(), scales.get(), sums.get(), inputs, channels};
  const float* const to_weight = smooth ? smoothing.data() : nullptr;
  const float* const to_rows = smooth ? factors.data() : nullptr;
  int8_pack_cpu(weight.view(to_weight), clip, packed, rounding.get(), workers);

  const auto out = std::make_unique<T[]>(rows * channels);
  for (const float* added : {static_cast<const float*>(nullptr), static_cast<const float*>(bias.data())}) {
    int8_linear_cpu(x.view(to_rows), packed, added, out.get(), workers);
    for (int64_t r = 0; r < rows; ++r) {
      const Quantized a = quantized(x, r, to_rows, 1);
      for (int64_t c = 0; c < channels; ++c) {
        const Quantized b = quantized(weight, c, to_weight, clip);
        int64_t sum = 0;
        for (int64_t i = 0; i < inputs; ++i) sum += a.levels[i] * b.levels[i];
        float value = static_cast<float>(sum) * b.scale * a.scale;
        if (added != nullptr) value += added[c];
        T expected;
        store(&expected, value);
        expect(to_float(out[r * channels + c]) == to_float(expected), name + ": product");
      }
    }
  }
  for (int64_t block = 0; block < int8_blocks(channels); ++block) {
    const Int8Rounding& of = rounding[block];
    expect(of.error >= 0 && of.error <= of.norm && (clip < 1 || of.clipped == 0), name + ": rounding");
  }
}

template <class T>
void run_all(const std::string& name) {
  for (const int64_t inputs : {1, 3, 16, 33, 130}) {
    for (const int64_t channels : {1, 16, 63, 64, 65, 150}) {
      for (const int64_t rows : {0, 1, 2, 5, 6, 13}) {
        const std::string size = name + ", " + std::to_string(rows) + " x " + std::to_string(inputs) + " x " +
                                 std::to_string(channels);
        run<T>(size, rows, channels, inputs, 1, false, kAlone);
        run<T>(size + ", smoothed", rows, channels, inputs, 0.8f, true, kThree);
      }
    }
  }
}

}  // namespace

int main() {
  if (!int8_supported()) {
    std::printf("skipped: this CPU lacks AVX-512 VNNI\n");
    return 0;
  }
  ++capabilities;
  run_all<float>("float32");
  run_all<BFloat16>("bfloat16");
  return report();
}
