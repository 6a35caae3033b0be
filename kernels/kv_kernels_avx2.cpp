// The KV kernels for AVX2, FMA and F16C (this file is compiled with those flags).
#include "kernels/attention_impl.h"
#include "kernels/kv_encode_impl.h"
#include "kernels/kv_simd_avx2.h"

namespace kvarn::cpu {

const KvKernels kKvKernelsAvx2 = {
    /*expand_from=*/6,
    encode_tile_with<Avx2>,
    BlockAttention<Avx2>::attend,
    BlockAttention<Avx2>::expand,
    BlockAttention<Avx2>::attend_expanded,
    BlockAttention<Avx2>::merge,
    BlockAttention<Avx2>::finish,
};

}  // namespace kvarn::cpu
