#include "kernels/kv_kernels.h"

namespace kvarn::cpu {

const KvKernels& kv_kernels(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::kAvx512) return kKvKernelsAvx512;
  if (isa == CpuIsa::kAvx2) return kKvKernelsAvx2;
#endif
  (void)isa;
  return kKvKernelsPortable;
}

}  // namespace kvarn::cpu
