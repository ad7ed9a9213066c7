// Turns the problems in `num_emitted` (rule.h) into sentences.

#pragma once

#include <cstdint>
#include <string>

// The sentence for one negative entry of num_emitted.
std::string problem_message(int32_t encoded, int64_t request);

// Throws std::invalid_argument for the first negative entry, if there is one.
void raise_for_problems(const int32_t* num_emitted, int64_t requests);
