// The noise of coupled sampling: one definition for SIMD code, CUDA code and scalar code.
//
// A 32-bit murmur3 hash of (seed, position, token id) stands for the uniform u = (hash + 0.5) / 2^32, and the Gumbel
// noise of the token is g = -log(-log(1 - u)): the stream of vLLM's V2 sampler and of rollout/sampling/gumbel_noise.py.
// The logarithm is written out here, in operations that IEEE 754 rounds exactly, so that CPU and CUDA compute the same
// bits.
//
// Everything is in an anonymous namespace on purpose: the files that include this are compiled for different
// instruction sets, and the linker must not merge their copies.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace {

constexpr uint32_t kMurmurC1 = 0xCC9E2D51u;
constexpr uint32_t kMurmurC2 = 0x1B873593u;
constexpr uint32_t kMurmurAdd = 0xE6546B64u;
constexpr uint32_t kMurmurFinal1 = 0x85EBCA6Bu;
constexpr uint32_t kMurmurFinal2 = 0xC2B2AE35u;
constexpr uint32_t kHashedBytes = 16;  // seed (8), position (4), token id (4)

// Hashed instead of a token id for the lenient rule's uniform. No vocabulary has such a token, so that uniform is as
// independent of the Gumbel noise as the noise of two tokens is of each other.
constexpr uint32_t kAcceptanceBlock = 0xFFFFFFFFu;

HOST_DEVICE bool is_nan(float x) { return x != x; }

template <int kBits>
HOST_DEVICE uint32_t rotate_left(uint32_t x) {
  return (x << kBits) | (x >> (32 - kBits));
}

// The hash is a template over the word, so that vectors of words (simd_*.h) run through the same lines.

template <class Word>
HOST_DEVICE Word scramble_product(Word block_times_c1) {
  return rotate_left<15>(block_times_c1) * Word(kMurmurC2);
}

template <class Word>
HOST_DEVICE Word absorb(Word state, Word scrambled) {
  const Word h = rotate_left<13>(state ^ scrambled);
  return (h << 2) + h + Word(kMurmurAdd);
}

// The final mix but for its last step, h ^ (h >> 16), which changes the low 16 bits only.
template <class Word>
HOST_DEVICE Word mix_but_last(Word h) {
  h = (h ^ (h >> 16) ^ Word(kHashedBytes)) * Word(kMurmurFinal1);  // = the usual order, as 16 >> 16 is 0
  return (h ^ (h >> 13)) * Word(kMurmurFinal2);
}

HOST_DEVICE uint32_t absorb_block(uint32_t state, uint32_t block) {
  return absorb(state, scramble_product(block * kMurmurC1));
}

// The state of the hash before the token id: one per row of logits.
HOST_DEVICE uint32_t row_state(int64_t seed, int64_t position) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  uint32_t state = absorb_block(0, static_cast<uint32_t>(bits));
  state = absorb_block(state, static_cast<uint32_t>(bits >> 32));
  return absorb_block(state, static_cast<uint32_t>(static_cast<uint64_t>(position)));
}

HOST_DEVICE uint32_t token_hash(uint32_t row, uint32_t token) {
  const uint32_t h = mix_but_last(absorb_block(row, token));
  return h ^ (h >> 16);
}

// log(v) of a normal, positive double, within 2 units in the last place. v = 2^k m with m in [0.7, 1.42), and
// log m = 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...) with s = (m - 1) / (m + 1), |s| < 0.172.
HOST_DEVICE double exact_log(double v) {
  int64_t bits;
  memcpy(&bits, &v, sizeof bits);
  constexpr int64_t kSqrtHalf = 0x3FE6A09E667F3BCD;  // the bits of 0.7071: the exponent steps there instead of at 1
  const int64_t k = (bits - kSqrtHalf) >> 52;
  bits -= k * (int64_t{1} << 52);
  double m;
  memcpy(&m, &bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 21;
  p = fma(p, z, 1.0 / 19);
  p = fma(p, z, 1.0 / 17);
  p = fma(p, z, 1.0 / 15);
  p = fma(p, z, 1.0 / 13);
  p = fma(p, z, 1.0 / 11);
  p = fma(p, z, 1.0 / 9);
  p = fma(p, z, 1.0 / 7);
  p = fma(p, z, 1.0 / 5);
  p = fma(p, z, 1.0 / 3);
  const double log_m = 2.0 * fma(s * z, p, s);
  return fma(static_cast<double>(k), 0.6931471805599453, log_m);
}

HOST_DEVICE double uniform(uint32_t hash) { return (hash + 0.5) * 0x1p-32; }

HOST_DEVICE double gumbel(uint32_t hash) {
  return -exact_log(-exact_log(1.0 - uniform(hash)));  // 1 - u is exact: a multiple of 2^-33
}

// What the sampled token maximises. `scaled` is float32(logit) * float32(1 / temperature), rounded to float32.
HOST_DEVICE double score(float scaled, uint32_t row, uint32_t token) {
  return static_cast<double>(scaled) + gumbel(token_hash(row, token));
}

// log u of the lenient rule at a row.
HOST_DEVICE double log_acceptance_uniform(uint32_t row) { return exact_log(uniform(token_hash(row, kAcceptanceBlock))); }

// Which tokens need no logarithm. As -log(1 - u) >= u, g <= -log u, so a token with scaled logit x can reach the score
// `best` only if u <= exp(x - best). With a reference value m (a maximum of the logits) this is
//     hash < exp(x - m) * survival_factor(m, best).
// Some logit equals m, and its noise is at least -3.14, so the final best is at least m - 3.14 whatever `best` is yet;
// this bounds the factor. The added terms cover all rounding: of exp, of float32, and of the double score, so that a
// token which ties after rounding is never dropped.
HOST_DEVICE float survival_factor(float m, float best) {
  const float gap = m - best + 1e-6f * fabsf(m) + 1e-3f;
  return expf(gap < 3.2f ? gap : 3.2f) * 0x1p32f;
}

// The vectors test the hash before its last step, which is at most this much larger than the hash itself.
constexpr float kLastStep = 65536.0f;

}  // namespace
