// The interface of the verifier's core, which knows nothing of torch, and the rules that CPU and CUDA share.

#pragma once

#include <cstdint>

#include "half.h"
#include "noise.h"

// The arguments of megatron_rl::verify_tokens as plain pointers; rollout/sampling/verify.py documents them, and
// docs/architecture.md says what verification is for.
struct VerifyArguments {
  const void* logits;      // [rows, vocab]
  Dtype dtype;
  int64_t row_stride;      // in elements
  int64_t rows;            // N
  int64_t vocab;           // V
  int64_t requests;        // B
  const int32_t* cu_rows;  // [B + 1]
  const int32_t* draft_ids;
  const float* temperature;
  const int64_t* seeds;
  const int64_t* positions;
  int64_t max_rows;
  const float* draft_logprobs;  // null without the lenient rule
  const float* lenience;        // null without the lenient rule
  int32_t* tokens;              // [B, max_rows]
  int32_t* num_emitted;         // [B]
  float* logprobs;              // [B, max_rows]
};

// What is wrong with a request. The output carries it as num_emitted = -(code + kProblemCodes * row of the request),
// because a CUDA kernel cannot raise; problem_message (problems.cpp) is the text.
enum class Problem : int32_t {
  kNone = 0,
  kNanLogits,
  kInfiniteLogits,
  kNothingToSample,
  kDraftId,
  kDraftLogprob,
  kTemperature,
  kCuRows,
  kMaxRows,
};
constexpr int32_t kProblemCodes = 16;

namespace {

constexpr float kGreedyBelow = 1e-5f;  // vLLM's limit; temperatures below it mean greedy

HOST_DEVICE int32_t encode_problem(Problem problem, int64_t row_of_request) {
  return -(static_cast<int32_t>(problem) + kProblemCodes * static_cast<int32_t>(row_of_request));
}

HOST_DEVICE bool is_greedy(float temperature) { return temperature < kGreedyBelow; }

HOST_DEVICE float inverse_temperature(float temperature) { return is_greedy(temperature) ? 1.0f : 1.0f / temperature; }

HOST_DEVICE Problem check_temperature(float temperature) {
  // NaN fails both comparisons.
  return temperature >= 0.0f && temperature < INFINITY ? Problem::kNone : Problem::kTemperature;
}

// Whether the lenient rule decides about the drafts of a request; else the coupled rule does.
HOST_DEVICE bool is_lenient(const VerifyArguments& arguments, int64_t request) {
  return arguments.lenience != nullptr && !is_nan(arguments.lenience[request]) &&
         !is_greedy(arguments.temperature[request]);
}

HOST_DEVICE Problem check_draft(const VerifyArguments& arguments, int64_t request, int64_t draft) {
  const int32_t token = arguments.draft_ids[draft];
  if (token < 0 || token >= arguments.vocab) return Problem::kDraftId;
  if (is_lenient(arguments, request)) {
    const float logprob = arguments.draft_logprobs[draft];
    if (is_nan(logprob) || logprob == INFINITY) return Problem::kDraftLogprob;
  }
  return Problem::kNone;
}

// log u <= lenience + (now - then). A draft that is masked out now is rejected whatever the lenience; an infinite
// lenience needs no case of its own: +inf accepts, and -inf rejects even where -inf + inf makes a NaN.
HOST_DEVICE bool accepts_leniently(float now, float then, float lenience, uint32_t row) {
  if (now == -INFINITY) return false;
  const double bound = static_cast<double>(lenience) + (static_cast<double>(now) - then);
  return log_acceptance_uniform(row) <= bound;
}

// The result of one row of logits, once its whole vocabulary has been read.
struct RowResult {
  int32_t token;          // the coupled sample
  float scaled;           // its logit / temperature
  double log_normalizer;  // log sum exp(logits / temperature)
  Problem problem;
};

HOST_DEVICE float scaled_logit(const VerifyArguments& arguments, int64_t request, int64_t row, int32_t token) {
  const int64_t index = row * arguments.row_stride + token;
  float logit;
  switch (arguments.dtype) {
    case Dtype::kFloat32: logit = static_cast<const float*>(arguments.logits)[index]; break;
    case Dtype::kBFloat16: logit = to_float(static_cast<const BFloat16*>(arguments.logits)[index]); break;
    default: logit = to_float(static_cast<const Half*>(arguments.logits)[index]);
  }
  return logit * inverse_temperature(arguments.temperature[request]);
}

struct Verdict {
  int32_t token;   // to emit
  float scaled;    // its logit / temperature
  bool continues;  // the request's next row counts too
};

// Accepts or rejects the draft of row `row_of_request` of a request.
HOST_DEVICE Verdict verify_row(const VerifyArguments& arguments, int64_t request, int64_t row_of_request,
                               const RowResult& row) {
  const int64_t first = arguments.cu_rows[request];
  const bool has_draft = first + row_of_request + 1 < arguments.cu_rows[request + 1];
  if (!has_draft) return {row.token, row.scaled, false};
  const int64_t index = first - request + row_of_request;
  const int32_t draft = arguments.draft_ids[index];
  if (!is_lenient(arguments, request)) return {row.token, row.scaled, row.token == draft};
  const float scaled = scaled_logit(arguments, request, first + row_of_request, draft);
  const float now = static_cast<float>(scaled - row.log_normalizer);
  const uint32_t state = row_state(arguments.seeds[request], arguments.positions[request] + row_of_request);
  if (accepts_leniently(now, arguments.draft_logprobs[index], arguments.lenience[request], state)) {
    return {draft, scaled, true};
  }
  return {row.token, row.scaled, false};
}

}  // namespace
