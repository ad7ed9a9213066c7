#include "logprobs_kernels.h"
#include "simd_portable.h"

Moments moments_portable(const Run& run) { return Logprobs<Portable>::moments_of(run); }

void gradient_portable(const Run& run, const RowGradient& row, void* out) {
  Logprobs<Portable>::gradient_of(run, row, out);
}
