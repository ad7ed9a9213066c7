#include "logprobs_kernels.h"
#include "simd_avx512.h"

Moments moments_avx512(const Run& run) { return Logprobs<Avx512>::moments_of(run); }

void gradient_avx512(const Run& run, const RowGradient& row, void* out) {
  Logprobs<Avx512>::gradient_of(run, row, out);
}
