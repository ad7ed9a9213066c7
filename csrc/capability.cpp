#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

Capability cpu_capability() {
#ifdef __x86_64__
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  const bool avx512 = false, avx2 = false;
#endif
  const char* wanted = std::getenv("MEGATRON_RL_CPU_CAPABILITY");
  if (wanted == nullptr) return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kPortable;
  const std::string name = wanted;
  if (name == "portable") return Capability::kPortable;
  if (name != "avx512" && name != "avx2") {
    throw std::invalid_argument("MEGATRON_RL_CPU_CAPABILITY is \"" + name + "\"; use avx512, avx2 or portable");
  }
  if (!(name == "avx512" ? avx512 : avx2)) {
    throw std::invalid_argument("MEGATRON_RL_CPU_CAPABILITY is \"" + name + "\", which this processor does not have");
  }
  return name == "avx512" ? Capability::kAvx512 : Capability::kAvx2;
}
