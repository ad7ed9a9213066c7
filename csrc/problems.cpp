#include "problems.h"

#include <stdexcept>

#include "rule.h"

std::string problem_message(int32_t encoded, int64_t request) {
  const auto problem = static_cast<Problem>(-encoded % kProblemCodes);
  const std::string of_request = " of request " + std::to_string(request);
  const std::string row = std::to_string(-encoded / kProblemCodes) + of_request;
  switch (problem) {
    case Problem::kNanLogits:
      return "verify_tokens: logits row " + row + " holds NaN";
    case Problem::kInfiniteLogits:
      return "verify_tokens: logits row " + row + " holds +inf, or a value that overflows when divided by temperature";
    case Problem::kNothingToSample:
      return "verify_tokens: logits row " + row + " has only -inf, so no token can be sampled";
    case Problem::kDraftId:
      return "verify_tokens: draft_ids: draft " + row + " is negative or not below the vocabulary size";
    case Problem::kDraftLogprob:
      return "verify_tokens: draft_logprobs: draft " + row + " has a log-probability that is NaN or +inf";
    case Problem::kTemperature:
      return "verify_tokens: temperature" + of_request + " must be finite and not negative";
    case Problem::kCuRows:
      return "verify_tokens: cu_rows must start at 0, rise with every request and end at the number of logits rows";
    case Problem::kMaxRows:
      return "verify_tokens: max_rows is smaller than the number of rows" + of_request;
    case Problem::kNone:
      break;
  }
  return "verify_tokens: num_emitted holds " + std::to_string(encoded) + ", which verify_tokens never writes";
}

void raise_for_problems(const int32_t* num_emitted, int64_t requests) {
  for (int64_t request = 0; request < requests; ++request) {
    if (num_emitted[request] < 0) throw std::invalid_argument(problem_message(num_emitted[request], request));
  }
}
