// Vectors of 8 for tile.h, scan.h and logprobs_kernels.h in plain C++: what runs where neither AVX2 nor AVX-512 is there.

#pragma once

#include "half.h"
#include "noise.h"

namespace {

struct PortableWords {
  uint32_t v[8];
  PortableWords() = default;
  explicit PortableWords(uint32_t x) {
    for (uint32_t& lane : v) lane = x;
  }
};

// Applies `f` to the lanes of one or two vectors.
template <class Vector, class Function>
inline Vector lanewise(const Vector& a, const Vector& b, Function f) {
  Vector result;
  for (int lane = 0; lane < 8; ++lane) result.v[lane] = f(a.v[lane], b.v[lane]);
  return result;
}

using Word = uint32_t;
inline PortableWords operator+(const PortableWords& a, const PortableWords& b) {
  return lanewise(a, b, [](Word x, Word y) { return x + y; });
}
inline PortableWords operator*(const PortableWords& a, const PortableWords& b) {
  return lanewise(a, b, [](Word x, Word y) { return x * y; });
}
inline PortableWords operator^(const PortableWords& a, const PortableWords& b) {
  return lanewise(a, b, [](Word x, Word y) { return x ^ y; });
}
inline PortableWords operator<<(const PortableWords& a, int bits) {
  return lanewise(a, a, [bits](Word x, Word) { return x << bits; });
}
inline PortableWords operator>>(const PortableWords& a, int bits) {
  return lanewise(a, a, [bits](Word x, Word) { return x >> bits; });
}

template <int kBits>
inline PortableWords rotate_left(const PortableWords& a) {
  return lanewise(a, a, [](Word x, Word) { return rotate_left<kBits>(x); });
}

struct PortableFloats {
  float v[8];
};

struct Portable {
  using Floats = PortableFloats;
  using Words = PortableWords;
  static constexpr int kWidth = 8;
  static constexpr float kHashUnit = 256.0f;  // exact, and cheaper to convert than 32 unsigned bits

  template <class Logit>
  static Floats load(const Logit* p) {
    Floats result;
    for (int lane = 0; lane < kWidth; ++lane) result.v[lane] = to_float(p[lane]);
    return result;
  }
  template <class Logit>
  static void store(Logit* p, const Floats& x) {
    for (int lane = 0; lane < kWidth; ++lane) ::store(p + lane, x.v[lane]);
  }
  static Floats all(float x) {
    Floats result;
    for (float& lane : result.v) lane = x;
    return result;
  }
  static Words consecutive(uint32_t first) {
    Words result;
    for (uint32_t lane = 0; lane < kWidth; ++lane) result.v[lane] = first + lane;
    return result;
  }

  static Floats add(const Floats& a, const Floats& b) {
    return lanewise(a, b, [](float x, float y) { return x + y; });
  }
  static Floats subtract(const Floats& a, const Floats& b) {
    return lanewise(a, b, [](float x, float y) { return x - y; });
  }
  static Floats multiply(const Floats& a, const Floats& b) {
    return lanewise(a, b, [](float x, float y) { return x * y; });
  }
  // Rounds twice where the others round once: the exponentials may differ in their last bit, the tokens cannot.
  static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) { return add(multiply(a, b), c); }
  static Floats max(const Floats& a, const Floats& b) {
    return lanewise(a, b, [](float x, float y) { return x > y ? x : y; });
  }
  static float max_of(const Floats& a) {
    float result = -INFINITY;
    for (float x : a.v) result = x > result ? x : result;
    return result;
  }
  static float sum_of(const Floats& a) {
    float result = 0;
    for (float x : a.v) result += x;
    return result;
  }
  static uint32_t less(const Floats& a, const Floats& b) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kWidth; ++lane) lanes |= static_cast<uint32_t>(a.v[lane] < b.v[lane]) << lane;
    return lanes;
  }
  // value, or 0 in the lanes where x < limit
  static Floats zero_where_less(const Floats& x, const Floats& limit, const Floats& value) {
    Floats result;
    for (int lane = 0; lane < kWidth; ++lane) result.v[lane] = x.v[lane] < limit.v[lane] ? 0 : value.v[lane];
    return result;
  }
  static Floats to_floats(const Words& a) {
    Floats result;
    for (int lane = 0; lane < kWidth; ++lane) result.v[lane] = static_cast<float>(static_cast<int32_t>(a.v[lane] >> 8));
    return result;
  }

  static Floats fraction(const Floats& t) {
    return lanewise(t, t, [](float x, float) { return x - floor_of(x); });
  }
  // a * 2^floor(t), for -126 <= t <= 0: the exponent is written into its bits.
  static Floats times_power_of_floor(const Floats& a, const Floats& t) {
    return lanewise(a, t, [](float x, float power) {
      return x * float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(floor_of(power)) + 127) << 23);
    });
  }

 private:
  // Without SSE 4.1 floorf is a call; a conversion is not. NaN is handled apart, as it must not be converted.
  static float floor_of(float x) {
    if (is_nan(x)) return 0;
    const float truncated = static_cast<float>(static_cast<int32_t>(x));
    return truncated > x ? truncated - 1 : truncated;
  }
};

}  // namespace
