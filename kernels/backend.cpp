#include "kernels/backend.h"

namespace kvarn {

void Backend::norm_linear(const NormedInput& input, const LinearWeight& weight, Tensor y) {
  rms_norm(input.x, input.weight, input.eps, input.scratch);
  linear(input.scratch, weight, y);
}

void Backend::norm_gate_up(const NormedInput& input, const LinearWeight& gate_up, Tensor scratch,
                           Tensor y) {
  norm_linear(input, gate_up, scratch);
  silu_mul(scratch, y);
}

void Backend::linear_add(Tensor x, const LinearWeight& weight, Tensor scratch, Tensor residual) {
  linear(x, weight, scratch);
  add(residual, scratch);
}

}  // namespace kvarn
