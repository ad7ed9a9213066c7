// The schema of megatron_rl::verify_tokens, and its CPU half.
//
// Only torch's stable ABI is used, so that one build serves several versions of torch.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "problems.h"
#include "verify_cpu.h"

namespace {

std::tuple<Tensor, Tensor, Tensor> verify_tokens(Tensor logits, Tensor cu_rows, Tensor draft_ids, Tensor temperature,
                                                 Tensor seeds, Tensor positions, int64_t max_rows,
                                                 std::optional<Tensor> draft_logprobs, std::optional<Tensor> lenience) {
  const Call call = make_call(logits, cu_rows, draft_ids, temperature, seeds, positions, max_rows, draft_logprobs,
                              lenience);
  verify_cpu(call.arguments, torch_workers());
  raise_for_problems(call.arguments.num_emitted, call.arguments.requests);
  return {call.tokens, call.num_emitted, call.logprobs};
}

// What a caller on CUDA uses once num_emitted has reached the host: a kernel cannot raise.
void raise_for_verify_status(Tensor num_emitted) {
  require(num_emitted.is_cpu() && num_emitted.dim() == 1 && num_emitted.scalar_type() == ScalarType::Int &&
              num_emitted.is_contiguous(),
          "num_emitted must be a contiguous int32 vector on the CPU to be checked");
  raise_for_problems(static_cast<const int32_t*>(num_emitted.const_data_ptr()), num_emitted.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_rl, library) {
  library.def(
      "verify_tokens(Tensor logits, Tensor cu_rows, Tensor draft_ids, Tensor temperature, Tensor seeds, "
      "Tensor positions, int max_rows, Tensor? draft_logprobs=None, Tensor? lenience=None) "
      "-> (Tensor tokens, Tensor num_emitted, Tensor logprobs)");
  library.def("raise_for_verify_status(Tensor num_emitted) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, library) {
  library.impl("verify_tokens", TORCH_BOX(&verify_tokens));
  library.impl("raise_for_verify_status", TORCH_BOX(&raise_for_verify_status));
}
