// Which instruction set the CPU code uses: the best of this processor, or what MEGATRON_RL_CPU_CAPABILITY names.

#pragma once

enum class Capability { kPortable, kAvx2, kAvx512 };

// Throws std::invalid_argument when the variable names an instruction set that does not exist or is not here.
Capability cpu_capability();

// The one of three functions that was compiled for `cpu_capability()`.
template <class Function>
Function for_this_cpu(Function portable, Function avx2, Function avx512) {
  switch (cpu_capability()) {
    case Capability::kAvx512: return avx512;
    case Capability::kAvx2: return avx2;
    case Capability::kPortable: return portable;
  }
  __builtin_unreachable();
}

// FOR_THIS_CPU(f) chooses among f_portable, f_avx2 and f_avx512; the last two exist on x86-64 alone.
#ifdef __x86_64__
#define FOR_THIS_CPU(name) for_this_cpu(name##_portable, name##_avx2, name##_avx512)
#else
#define FOR_THIS_CPU(name) for_this_cpu(name##_portable, name##_portable, name##_portable)
#endif
