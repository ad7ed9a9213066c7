// The schemas of megatron_rl::token_logprob_sums and token_logprob_gradient, and their CPU half.
//
// Only torch's stable ABI is used, so that one build serves several versions of torch.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "logprobs.h"
#include "tensors.h"

namespace {

LogprobArguments make_arguments(const Checks& checks, const Tensor& logits, const Tensor& tokens, double temperature,
                                int64_t valid) {
  checks.check_logits(logits);
  checks.require(temperature > 0 && std::isfinite(temperature), "temperature must be positive and finite");
  checks.require(valid >= 0 && valid <= logits.size(1), "valid must be between 0 and the number of columns of logits");
  LogprobArguments a;
  a.logits = logits.const_data_ptr();
  a.dtype = checks.dtype_of(logits);
  a.row_stride = logits.stride(0);
  a.rows = logits.size(0);
  a.width = logits.size(1);
  a.valid = valid;
  a.tokens = checks.vector_of<int64_t>(tokens, "tokens", ScalarType::Long, "int64", a.rows, logits);
  a.inverse_temperature = 1.0f / static_cast<float>(temperature);
  return a;
}

std::tuple<Tensor, Tensor> token_logprob_sums(Tensor logits, Tensor tokens, double temperature, int64_t valid) {
  const LogprobArguments a = make_arguments(Checks{"token_logprob_sums"}, logits, tokens, temperature, valid);
  Tensor maxima = torch::stable::new_empty(logits, {a.rows}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(logits, {3, a.rows}, ScalarType::Float);
  logprob_sums_cpu(a, static_cast<float*>(maxima.mutable_data_ptr()), static_cast<float*>(sums.mutable_data_ptr()),
                   torch_workers());
  return {maxima, sums};
}

Tensor token_logprob_gradient(Tensor logits, Tensor tokens, Tensor normalizers, Tensor entropies,
                              std::optional<Tensor> for_logprobs, std::optional<Tensor> for_entropies,
                              double temperature, int64_t valid) {
  const Checks checks{"token_logprob_gradient"};
  const LogprobArguments a = make_arguments(checks, logits, tokens, temperature, valid);
  const auto per_row = [&](const Tensor& tensor, const char* argument) {
    return checks.vector_of<float>(tensor, argument, ScalarType::Float, "float32", a.rows, logits);
  };
  UpstreamGradients upstream;
  upstream.normalizers = per_row(normalizers, "normalizers");
  upstream.entropies = per_row(entropies, "entropies");
  upstream.logprobs = for_logprobs.has_value() ? per_row(*for_logprobs, "for_logprobs") : nullptr;
  upstream.entropy = for_entropies.has_value() ? per_row(*for_entropies, "for_entropies") : nullptr;
  Tensor gradient = torch::stable::new_empty(logits, {a.rows, a.width}, logits.scalar_type());
  logprob_gradient_cpu(a, upstream, gradient.mutable_data_ptr(), torch_workers());
  return gradient;
}

}  // namespace

// A fragment: the verifier's library defines the namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def(
      "token_logprob_sums(Tensor logits, Tensor tokens, float temperature, int valid) "
      "-> (Tensor maxima, Tensor sums)");
  library.def(
      "token_logprob_gradient(Tensor logits, Tensor tokens, Tensor normalizers, Tensor entropies, "
      "Tensor? for_logprobs, Tensor? for_entropies, float temperature, int valid) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, library) {
  library.impl("token_logprob_sums", TORCH_BOX(&token_logprob_sums));
  library.impl("token_logprob_gradient", TORCH_BOX(&token_logprob_gradient));
}
