// The schemas of megatron_rl::int8_pack and int8_linear, and their CPU half; documented in rollout/quantization/int8.py.
//
// Only torch's stable ABI is used, so that one build serves several versions of torch.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "int8.h"
#include "tensors.h"

namespace {

const float* factors_of(const Checks& checks, const std::optional<Tensor>& factors, const char* name,
                        const Tensor& dense) {
  if (!factors.has_value()) return nullptr;
  return checks.vector_of<float>(*factors, name, ScalarType::Float, "float32", dense.size(1), dense);
}

Int8Rows rows_of(const Checks& checks, const Tensor& dense, const char* name, const std::optional<Tensor>& factors,
                 const char* factors_name) {
  checks.require(int8_supported(), "this CPU lacks AVX-512 VNNI");
  checks.require(dense.dim() == 2 && (dense.size(1) <= 1 || dense.stride(1) == 1),
                 std::string(name) + " must be two-dimensional and contiguous in the last dimension");
  checks.require(dense.size(1) < 66000, std::string(name) + " has more columns than int32 sums can hold");
  checks.require(dense.scalar_type() == ScalarType::Float || dense.scalar_type() == ScalarType::BFloat16,
                 std::string(name) + " must be float32 or bfloat16");
  return {dense.const_data_ptr(), checks.dtype_of(dense), dense.stride(0), dense.size(0),
          factors_of(checks, factors, factors_name, dense)};
}

Int8Weight weight_of(const Checks& checks, const Tensor& dense, Tensor& packed, Tensor& scales, Tensor& sums,
                     int64_t channels) {
  checks.vector_of<float>(scales, "scales", ScalarType::Float, "float32", channels, dense);
  checks.vector_of<int32_t>(sums, "sums", ScalarType::Int, "int32", channels, dense);
  const int64_t bytes = int8_bytes(dense.size(1), channels);
  checks.vector_of<int8_t>(packed, "packed", ScalarType::Char, "int8", bytes, dense);
  return {static_cast<int8_t*>(packed.mutable_data_ptr()), static_cast<float*>(scales.mutable_data_ptr()),
          static_cast<int32_t*>(sums.mutable_data_ptr()), dense.size(1), channels};
}

Tensor int8_pack(Tensor weight, Tensor packed, Tensor scales, Tensor sums, std::optional<Tensor> smoothing,
                 double clip) {
  const Checks checks{"int8_pack"};
  const Int8Rows rows = rows_of(checks, weight, "weight", smoothing, "smoothing");
  const Int8Weight room = weight_of(checks, weight, packed, scales, sums, rows.rows);
  checks.require(clip > 0 && clip <= 1, "clip must be above 0 and at most 1");
  static_assert(sizeof(Int8Rounding) == 3 * sizeof(double));
  Tensor rounding = torch::stable::new_empty(weight, {int8_blocks(rows.rows), 3}, ScalarType::Double);
  int8_pack_cpu(rows, static_cast<float>(clip), room, static_cast<Int8Rounding*>(rounding.mutable_data_ptr()),
                torch_workers());
  return rounding;
}

Tensor int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor sums, std::optional<Tensor> bias,
                   std::optional<Tensor> factors) {
  const Checks checks{"int8_linear"};
  const Int8Rows rows = rows_of(checks, x, "x", factors, "factors");
  const int64_t channels = scales.dim() == 1 ? scales.size(0) : -1;
  const Int8Weight weight = weight_of(checks, x, packed, scales, sums, channels);
  const float* added =
      bias.has_value() ? checks.vector_of<float>(*bias, "bias", ScalarType::Float, "float32", channels, x) : nullptr;
  Tensor out = torch::stable::new_empty(x, {rows.rows, channels}, x.scalar_type());
  int8_linear_cpu(rows, weight, added, out.mutable_data_ptr(), torch_workers());
  return out;
}

}  // namespace

// A fragment: the verifier's library defines the namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(megatron_rl, library) {
  library.def(
      "int8_pack(Tensor weight, Tensor(a!) packed, Tensor(b!) scales, Tensor(c!) sums, Tensor? smoothing, float clip) "
      "-> Tensor");
  library.def(
      "int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, Tensor? factors) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl, CPU, library) {
  library.impl("int8_pack", TORCH_BOX(&int8_pack));
  library.impl("int8_linear", TORCH_BOX(&int8_linear));
}
