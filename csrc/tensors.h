// Checks of an operator's tensors: shapes, dtypes, devices, contiguity; and torch's threads for the core.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "half.h"
#include "workers.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument, with the operator's name before the message.
struct Checks {
  const char* name;

  void require(bool condition, const std::string& message) const {
    if (!condition) throw std::invalid_argument(std::string(name) + ": " + message);
  }

  template <class T>
  const T* vector_of(const Tensor& tensor, const char* argument, ScalarType dtype, const char* dtype_name,
                     int64_t length, const Tensor& logits) const {
    const std::string prefix = std::string(argument) + " must ";
    require(tensor.dim() == 1 && tensor.size(0) == length,
            prefix + "be one-dimensional with " + std::to_string(length) + " entries");
    require(tensor.scalar_type() == dtype, prefix + "be " + dtype_name);
    require(tensor.device() == logits.device(), prefix + "be on the device of logits");
    require(tensor.is_contiguous(), prefix + "be contiguous");
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  Dtype dtype_of(const Tensor& logits) const {
    switch (logits.scalar_type()) {
      case ScalarType::Float: return Dtype::kFloat32;
      case ScalarType::BFloat16: return Dtype::kBFloat16;
      case ScalarType::Half: return Dtype::kFloat16;
      default: break;
    }
    require(false, "logits must be float32, bfloat16 or float16");
    __builtin_unreachable();
  }

  void check_logits(const Tensor& logits) const {
    require(logits.dim() == 2, "logits must be two-dimensional, [rows, vocab]");
    require(logits.size(1) <= INT32_MAX, "logits must have fewer than 2^31 columns");
    require(logits.size(1) <= 1 || logits.stride(1) == 1, "logits must be contiguous in the last dimension");
    require(logits.size(0) <= INT32_MAX, "logits must have fewer than 2^31 rows");
  }
};

inline Workers torch_workers() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  return {threads, [threads](const std::function<void()>& body) {
            torch::stable::parallel_for(0, threads, 1, [&body](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body();
            });
          }};
}

}  // namespace
