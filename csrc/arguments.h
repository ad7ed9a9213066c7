// Checks the tensors of a call (shapes, dtypes, devices, contiguity) and makes the outputs. Shared by CPU and CUDA.

#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "rule.h"
#include "tensors.h"

namespace {

constexpr Checks kChecks{"verify_tokens"};

inline void require(bool condition, const std::string& message) { kChecks.require(condition, message); }

// A call's arguments, with the tensors that own what the pointers point to.
struct Call {
  VerifyArguments arguments;
  Tensor tokens, num_emitted, logprobs;
};

inline Call make_call(const Tensor& logits, const Tensor& cu_rows, const Tensor& draft_ids, const Tensor& temperature,
                      const Tensor& seeds, const Tensor& positions, int64_t max_rows,
                      const std::optional<Tensor>& draft_logprobs, const std::optional<Tensor>& lenience) {
  kChecks.check_logits(logits);
  require(logits.size(1) >= 1, "logits must have at least one column");
  require(cu_rows.dim() == 1 && cu_rows.size(0) >= 1, "cu_rows must be one-dimensional with one entry per request + 1");
  const int64_t rows = logits.size(0), requests = cu_rows.size(0) - 1, drafts = rows - requests;
  require(drafts >= 0, "cu_rows has more requests than logits has rows");
  require(requests > 0 || rows == 0, "cu_rows has no request, but logits has rows");
  require(max_rows >= 0 && (requests == 0 || max_rows >= 1), "max_rows must be at least 1");
  require(draft_logprobs.has_value() == lenience.has_value(), "draft_logprobs and lenience must be given together");
  Tensor tokens = torch::stable::new_empty(logits, {requests, max_rows}, ScalarType::Int);
  Tensor num_emitted = torch::stable::new_empty(logits, {requests}, ScalarType::Int);
  Tensor logprobs = torch::stable::new_empty(logits, {requests, max_rows}, ScalarType::Float);
  VerifyArguments a;
  a.logits = logits.const_data_ptr();
  a.dtype = kChecks.dtype_of(logits);
  a.row_stride = logits.stride(0);
  a.rows = rows;
  a.vocab = logits.size(1);
  a.requests = requests;
  a.cu_rows = kChecks.vector_of<int32_t>(cu_rows, "cu_rows", ScalarType::Int, "int32", requests + 1, logits);
  a.draft_ids = kChecks.vector_of<int32_t>(draft_ids, "draft_ids", ScalarType::Int, "int32", drafts, logits);
  a.temperature = kChecks.vector_of<float>(temperature, "temperature", ScalarType::Float, "float32", requests, logits);
  a.seeds = kChecks.vector_of<int64_t>(seeds, "seeds", ScalarType::Long, "int64", requests, logits);
  a.positions = kChecks.vector_of<int64_t>(positions, "positions", ScalarType::Long, "int64", requests, logits);
  a.max_rows = max_rows;
  a.draft_logprobs = nullptr;
  a.lenience = nullptr;
  if (lenience.has_value()) {
    a.draft_logprobs =
        kChecks.vector_of<float>(*draft_logprobs, "draft_logprobs", ScalarType::Float, "float32", drafts, logits);
    a.lenience = kChecks.vector_of<float>(*lenience, "lenience", ScalarType::Float, "float32", requests, logits);
  }
  a.tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  a.num_emitted = static_cast<int32_t*>(num_emitted.mutable_data_ptr());
  a.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  return {a, tokens, num_emitted, logprobs};
}

}  // namespace
