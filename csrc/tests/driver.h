// What the drivers of `make sanitize` share.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "capability.h"
#include "half.h"
#include "workers.h"

namespace {

int failures = 0, capabilities = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  float between(float low, float high) { return low + (high - low) * static_cast<float>(next()) / 0x1p31f; }
};

template <class Logit>
constexpr Dtype dtype_of() {
  if (std::is_same_v<Logit, float>) return Dtype::kFloat32;
  return std::is_same_v<Logit, BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;
}

const Workers kAlone{1, [](const std::function<void()>& body) { body(); }};
const Workers kThree{3, [](const std::function<void()>& body) {
                       std::vector<std::thread> threads;
                       for (int i = 0; i < 3; ++i) threads.emplace_back(body);
                       for (std::thread& thread : threads) thread.join();
                     }};

// Calls `run` with the name of each instruction set of this processor, which is then in use.
template <class Function>
void for_each_capability(Function run) {
  for (const char* capability : {"portable", "avx2", "avx512"}) {
    setenv("MEGATRON_RL_CPU_CAPABILITY", capability, 1);
    try {
      cpu_capability();
    } catch (const std::invalid_argument& error) {
      std::printf("skipped: %s\n", error.what());
      continue;
    }
    ++capabilities;
    run(std::string(capability));
  }
  unsetenv("MEGATRON_RL_CPU_CAPABILITY");  // the last name may be one that this processor does not have
}

// Prints the result; the exit status.
int report() {
  std::printf("%d instruction sets, %d failures\n", capabilities, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
