// The verifier on the CPU, without torch.

#pragma once

#include "rule.h"
#include "workers.h"

// Fills tokens, num_emitted and logprobs. Problems in the data end up in num_emitted (see rule.h). Throws
// std::invalid_argument when MEGATRON_RL_CPU_CAPABILITY names an instruction set that does not exist or is not here.
void verify_cpu(const VerifyArguments& arguments, const Workers& workers);
