// The rotation of KVarN: multiplication by the Sylvester (natural-order) Hadamard matrix / sqrt(n).
// The matrix is symmetric and orthonormal, so one routine rotates and rotates back. Butterflies are
// element-wise adds: every instruction set gives the same bits. Source: arXiv 2606.03458.
#pragma once

#include <cmath>

#include "kernels/core/check.h"

namespace kvarn::cpu {

// In place on x[0, n); n is a power of two.
inline void hadamard_rotate(float* x, int n) {
  DCHECK(n > 0 && (n & (n - 1)) == 0, "the Hadamard rotation needs a power of two");
  for (int half = 1; half < n; half *= 2) {
    for (int base = 0; base < n; base += 2 * half) {
      for (int i = base; i < base + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace kvarn::cpu
