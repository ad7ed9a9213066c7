// The verifier on CUDA, in two kernels: every block reads one slice of one row, then one block per request combines the
// slices of its rows and walks along its drafts.
//
// Blocks read rows beyond the first difference too: they run at the same time, and reading them costs less than waiting
// to know. Scores are compared exactly, as on the CPU, but a float estimate decides unless two scores are very close.

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "candidate.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kResolveThreads = 128;
constexpr int kResolveWarps = kResolveThreads / 32;
// Fixed, so that a row is divided in the same way in every batch.
constexpr int64_t kSlice = 8192;
constexpr int kPerThread = 16;  // logits that a thread has in flight: four or two 16-byte loads
constexpr float kLog2E = 1.44269504f;

// What is known of some part of a row: the largest scaled logit, sum of exp(scaled - max), and the best token.
struct Partial {
  float max;
  float sum;
  Candidate best;
};

__device__ float exp2_approximately(float x) {  // within 2 units in the last place; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Integers in the order of the floats, for atomicMax; the function is its own inverse.
__device__ int ordered(int float_bits) { return float_bits >= 0 ? float_bits : float_bits ^ 0x7FFFFFFF; }
__device__ int to_ordered(float x) { return ordered(__float_as_int(x)); }
__device__ float from_ordered(int x) { return __int_as_float(ordered(x)); }

// One thread's share of a slice. `bound` is shared by the block: no more than the slice's best score.
class Reader {
 public:
  __device__ Reader(const Row& row, int* bound) : row_(row), bound_(bound) {}

  // Raises the bound by the noisy score of the thread's largest logit, so that reading starts with a useful bound.
  // All threads of a warp must call this.
  template <int kCount, class Id>
  __device__ void seed_bound(const float (&scaled)[kCount], Id id) {
    if (row_.greedy) return;
    int top = 0;
    float max = scaled[0];
#pragma unroll
    for (int e = 1; e < kCount; ++e) {
      if (scaled[e] > max) {
        max = scaled[e];
        top = e;
      }
    }
    int low = to_ordered(-INFINITY);
    if (max > -INFINITY && max < INFINITY) {
      const auto token = static_cast<uint32_t>(id(top));
      const Candidate candidate{estimate_score(max, token_hash(row_.state, token)), max, static_cast<int32_t>(token)};
      low = to_ordered(candidate.estimate - slack(candidate));
    }
    low = __reduce_max_sync(kAllLanes, low);
    if (threadIdx.x % 32 == 0) atomicMax(bound_, low);
  }

  // Takes in `kCount` scaled logits; absent ones are -inf. `id(e)` is the token of the e-th, rising with e.
  template <int kCount, class Id>
  __device__ void read(const float (&scaled)[kCount], Id id) {
    float top = scaled[0];
#pragma unroll
    for (int e = 1; e < kCount; ++e) top = fmaxf(top, scaled[e]);  // leaves NaN aside; the sum will show it
    if (top > own_.max) {
      own_.sum *= exp2_approximately((own_.max - top) * kLog2E);
      own_.max = top;
    }
    const float reference = own_.max == -INFINITY ? 0.0f : own_.max;  // -inf - -inf would be NaN
    const float bound = from_ordered(*static_cast<volatile int*>(bound_));
    const float factor = row_.greedy ? 0.0f : survival_factor(reference, bound);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float weight = exp2_approximately((scaled[e] - reference) * kLog2E);
      own_.sum += weight;
      if (row_.greedy) {
        if (scaled[e] == top) consider(scaled[e], id(e));
      } else {
        const uint32_t hash = mix_but_last(absorb(row_.state, scramble_product(id(e) * kMurmurC1)));
        if (__uint2float_rn(hash) < fmaf(weight, factor, kLastStep)) consider(scaled[e], id(e));
      }
    }
  }

  __device__ const Partial& result() const { return own_; }

 private:
  __device__ void consider(float scaled, uint32_t token) {
    if (scaled == -INFINITY) return;
    Candidate candidate{scaled, scaled, static_cast<int32_t>(token)};
    if (!row_.greedy) candidate.estimate = estimate_score(scaled, token_hash(row_.state, token));
    if (!beats(candidate, own_.best, row_)) return;
    own_.best = candidate;
    if (!row_.greedy) atomicMax(bound_, to_ordered(candidate.estimate - slack(candidate)));
  }

  const Row& row_;
  int* bound_;
  Partial own_{-INFINITY, 0.0f, {-INFINITY, -INFINITY, -1}};
};

__device__ Partial merged(const Partial& a, const Partial& b, const Row& row) {
  const float max = fmaxf(a.max, b.max);
  const float reference = max == -INFINITY ? 0.0f : max;
  Partial result;
  result.max = max;
  result.sum = a.sum * exp2_approximately((a.max - reference) * kLog2E) +
               b.sum * exp2_approximately((b.max - reference) * kLog2E);
  result.best = beats(b.best, a.best, row) ? b.best : a.best;
  return result;
}

// The merged result of a block's threads, in thread 0. All threads must call this.
__device__ Partial merged_over_block(Partial own, const Row& row) {
  __shared__ Partial of_warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 16; distance > 0; distance /= 2) {
    const Partial other{__shfl_down_sync(kAllLanes, own.max, distance), __shfl_down_sync(kAllLanes, own.sum, distance),
                        shuffled_down(own.best, distance)};
    if (lane < distance) own = merged(own, other, row);
  }
  if (lane == 0) of_warps[warp] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) own = merged(own, of_warps[w], row);
  }
  return own;
}

__device__ float as_float(float x) { return x; }
__device__ float as_float(BFloat16 x) { return to_float(x); }
__device__ float as_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

// Reads the logits [begin, end) of a row into `reader`: 16-byte loads for the aligned middle, single ones around it.
template <class Logit>
__device__ void read_slice(const Logit* row, int64_t begin, int64_t end, const Row& info, Reader& reader) {
  constexpr int kVector = 16 / sizeof(Logit), kLoads = kPerThread / kVector;
  const Logit* first = row + begin;
  const int count = static_cast<int>(end - begin);
  const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(Logit));
  const int head = min(count, beyond == 0 ? 0 : kVector - beyond);
  const int vectors = (count - head) / kVector;
  const auto* middle = reinterpret_cast<const uint4*>(first + head);
  for (int base = 0; base < vectors; base += kThreads * kLoads) {
    float scaled[kPerThread];
    uint4 loaded[kLoads] = {};
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int vector = base + load * kThreads + static_cast<int>(threadIdx.x);
      if (vector < vectors) loaded[load] = __ldcs(middle + vector);
    }
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const bool present = base + load * kThreads + static_cast<int>(threadIdx.x) < vectors;
      Logit values[kVector];
      memcpy(values, &loaded[load], sizeof values);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        // __fmul_rn is never fused with what follows: the scaled logit is the rounded product, as on the CPU.
        scaled[load * kVector + e] = present ? __fmul_rn(as_float(values[e]), info.inverse_temperature) : -INFINITY;
      }
    }
    const auto origin = static_cast<uint32_t>(begin + head + (base + static_cast<int>(threadIdx.x)) * kVector);
    const auto id = [origin](int e) {
      return origin + static_cast<uint32_t>(e / kVector * kThreads * kVector + e % kVector);
    };
    if (base == 0) {
      reader.seed_bound(scaled, id);
      __syncthreads();
    }
    reader.read(scaled, id);
  }
  const int loose = static_cast<int>(threadIdx.x);  // fewer than 2 * kVector logits, at most one per thread
  const int place = loose < head ? loose : loose + vectors * kVector;
  if (place < count) {
    const float scaled[1] = {__fmul_rn(as_float(first[place]), info.inverse_temperature)};
    const auto token = static_cast<uint32_t>(begin + place);
    reader.read(scaled, [token](int) { return token; });
  }
}

// One block per slice of a row; partials[row * slices + slice].
template <class Logit>
__global__ void __launch_bounds__(kThreads) scan_slices(VerifyArguments a, int64_t slices, Partial* partials) {
  __shared__ int request, bound;
  const int64_t row = blockIdx.x / slices, slice = blockIdx.x % slices;
  if (threadIdx.x == 0) {
    request = -1;
    bound = to_ordered(-INFINITY);
  }
  __syncthreads();
  for (int64_t b = threadIdx.x; b < a.requests; b += kThreads) {
    if (a.cu_rows[b] <= row && row < a.cu_rows[b + 1]) request = static_cast<int>(b);
  }
  __syncthreads();
  if (request < 0) return;  // cu_rows is inconsistent, which resolve_requests reports
  const Row info = row_of(a, request, row - a.cu_rows[request]);
  Reader reader(info, &bound);
  const int64_t begin = slice * kSlice, end = min(begin + kSlice, a.vocab);
  read_slice(static_cast<const Logit*>(a.logits) + row * a.row_stride, begin, end, info, reader);
  const Partial result = merged_over_block(reader.result(), info);
  if (threadIdx.x == 0) partials[blockIdx.x] = result;
}

// Combines the slices of a row; the result is in lane 0 of the warp that calls this.
__device__ RowResult combine(const Partial* partials, int64_t slices, const Row& info) {
  const int lane = threadIdx.x % 32;
  float max = -INFINITY;
  Candidate best{-INFINITY, -INFINITY, -1};
  for (int64_t slice = lane; slice < slices; slice += 32) {
    max = fmaxf(max, partials[slice].max);
    if (beats(partials[slice].best, best, info)) best = partials[slice].best;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
    const Candidate other = shuffled_down(best, distance);
    if (lane < distance && beats(other, best, info)) best = other;
  }
  double sum = 0;
  for (int64_t slice = lane; slice < slices; slice += 32) {
    const Partial& partial = partials[slice];
    // Where all is masked the sum is 0, or NaN to report.
    const double weight = partial.max == -INFINITY ? 1.0 : exp(static_cast<double>(partial.max) - max);
    sum += partial.sum * weight;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  const Problem problem = max == INFINITY    ? Problem::kInfiniteLogits
                          : sum != sum       ? Problem::kNanLogits
                          : max == -INFINITY ? Problem::kNothingToSample
                                             : Problem::kNone;
  return {best.token, best.scaled, max + log(sum), problem};
}

// Whatever can be wrong with a request but its logits, encoded for num_emitted; 0 when all is well. The same in all
// threads of the block, which must all call this.
__device__ int32_t problem_of(const VerifyArguments& a, int64_t request) {
  __shared__ int first_bad_draft;
  if (threadIdx.x == 0) first_bad_draft = INT32_MAX;
  bool bad = a.cu_rows[0] != 0 || a.cu_rows[a.requests] != a.rows;
  for (int64_t b = threadIdx.x; b < a.requests; b += kResolveThreads) bad |= a.cu_rows[b + 1] <= a.cu_rows[b];
  if (__syncthreads_or(bad)) return encode_problem(Problem::kCuRows, 0);
  const int64_t first = a.cu_rows[request], rows = a.cu_rows[request + 1] - first;
  Problem problem = check_temperature(a.temperature[request]);
  if (problem == Problem::kNone && rows > a.max_rows) problem = Problem::kMaxRows;
  if (problem != Problem::kNone) return encode_problem(problem, 0);
  for (int64_t row = threadIdx.x; row < rows - 1; row += kResolveThreads) {
    if (check_draft(a, request, first - request + row) != Problem::kNone) {
      atomicMin(&first_bad_draft, static_cast<int>(row));
    }
  }
  __syncthreads();
  const int bad_row = first_bad_draft;
  if (bad_row == INT32_MAX) return 0;
  return encode_problem(check_draft(a, request, first - request + bad_row), bad_row);
}

// Writes the result of a row; returns whether the request continues. One thread calls this.
__device__ bool emit(const VerifyArguments& a, int64_t request, int64_t row, const RowResult& result) {
  const int64_t out = request * a.max_rows;
  if (result.problem != Problem::kNone) {
    for (int64_t column = 0; column < row; ++column) {
      a.tokens[out + column] = -1;
      a.logprobs[out + column] = 0.0f;
    }
    a.num_emitted[request] = encode_problem(result.problem, row);
    return false;
  }
  const Verdict verdict = verify_row(a, request, row, result);
  a.tokens[out + row] = verdict.token;
  a.logprobs[out + row] = static_cast<float>(verdict.scaled - result.log_normalizer);
  a.num_emitted[request] = static_cast<int32_t>(row) + 1;
  return verdict.continues;
}

// One block per request: combines as many rows at a time as it has warps, and stops at the first difference.
__global__ void __launch_bounds__(kResolveThreads) resolve_requests(VerifyArguments a, int64_t slices,
                                                                    const Partial* partials) {
  __shared__ RowResult results[kResolveWarps];
  __shared__ bool continues;
  const int64_t request = blockIdx.x;
  const int32_t problem = problem_of(a, request);
  for (int64_t column = threadIdx.x; column < a.max_rows; column += kResolveThreads) {
    a.tokens[request * a.max_rows + column] = -1;
    a.logprobs[request * a.max_rows + column] = 0.0f;
  }
  if (problem != 0) {
    if (threadIdx.x == 0) a.num_emitted[request] = problem;
    return;
  }
  const int64_t first = a.cu_rows[request], rows = a.cu_rows[request + 1] - first;
  for (int64_t base = 0; base < rows; base += kResolveWarps) {
    const int64_t row = base + threadIdx.x / 32;
    if (row < rows) {
      const RowResult result = combine(partials + (first + row) * slices, slices, row_of(a, request, row));
      if (threadIdx.x % 32 == 0) results[threadIdx.x / 32] = result;
    }
    __syncthreads();  // also orders the filling of the outputs before what emit writes
    if (threadIdx.x == 0) {
      continues = true;
      for (int64_t i = 0; continues && i < kResolveWarps && base + i < rows; ++i) {
        continues = emit(a, request, base + i, results[i]);
      }
    }
    __syncthreads();
    if (!continues) return;
  }
}

void launch(const VerifyArguments& a, int64_t slices, Partial* partials, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.rows * slices);
  switch (a.dtype) {
    case Dtype::kFloat32: scan_slices<float><<<blocks, kThreads, 0, stream>>>(a, slices, partials); break;
    case Dtype::kBFloat16: scan_slices<BFloat16><<<blocks, kThreads, 0, stream>>>(a, slices, partials); break;
    case Dtype::kFloat16: scan_slices<Half><<<blocks, kThreads, 0, stream>>>(a, slices, partials); break;
  }
  resolve_requests<<<static_cast<unsigned>(a.requests), kResolveThreads, 0, stream>>>(a, slices, partials);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("verify_tokens: the CUDA kernels did not start: ") + cudaGetErrorString(error));
  }
}

std::tuple<Tensor, Tensor, Tensor> verify_tokens(Tensor logits, Tensor cu_rows, Tensor draft_ids, Tensor temperature,
                                                 Tensor seeds, Tensor positions, int64_t max_rows,
                                                 std::optional<Tensor> draft_logprobs, std::optional<Tensor> lenience) {
  require(logits.is_cuda(), "logits must be on CUDA, as another argument is");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Call call = make_call(logits, cu_rows, draft_ids, temperature, seeds, positions, max_rows, draft_logprobs,
                              lenience);
  const VerifyArguments& a = call.arguments;
  if (a.requests > 0) {
    const int64_t slices = (a.vocab + kSlice - 1) / kSlice;
    require(a.rows * slices <= INT32_MAX, "logits are too large for one launch");
    const auto bytes = static_cast<int64_t>(a.rows * slices * sizeof(Partial));
    Tensor partials = torch::stable::new_empty(logits, {bytes}, ScalarType::Byte);
    const auto stream = torch::stable::accelerator::getCurrentStream(logits.get_device_index());
    launch(a, slices, static_cast<Partial*>(partials.mutable_data_ptr()),
           static_cast<cudaStream_t>(stream.nativeHandle()));
  }
  return {call.tokens, call.num_emitted, call.logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CUDA, library) { library.impl("verify_tokens", TORCH_BOX(&verify_tokens)); }
