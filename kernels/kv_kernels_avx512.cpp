// The KV kernels for AVX-512 F, BW, VL and DQ (this file is compiled with those flags).
#include "kernels/attention_impl.h"
#include "kernels/kv_encode_impl.h"
#include "kernels/kv_simd_avx512.h"

namespace kvarn::cpu {

const KvKernels kKvKernelsAvx512 = {
    /*expand_from=*/24,
    encode_tile_with<Avx512>,
    BlockAttention<Avx512>::attend,
    BlockAttention<Avx512>::expand,
    BlockAttention<Avx512>::attend_expanded,
    BlockAttention<Avx512>::merge,
    BlockAttention<Avx512>::finish,
};

}  // namespace kvarn::cpu
