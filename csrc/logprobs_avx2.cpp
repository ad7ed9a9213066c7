#include "logprobs_kernels.h"
#include "simd_avx2.h"

Moments moments_avx2(const Run& run) { return Logprobs<Avx2>::moments_of(run); }

void gradient_avx2(const Run& run, const RowGradient& row, void* out) {
  Logprobs<Avx2>::gradient_of(run, row, out);
}
