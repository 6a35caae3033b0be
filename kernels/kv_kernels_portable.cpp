// The KV kernels without any instruction set: the fallback and the twin of the others.
#include "kernels/attention_impl.h"
#include "kernels/kv_encode_impl.h"
#include "kernels/kv_simd_portable.h"

namespace kvarn::cpu {

const KvKernels kKvKernelsPortable = {
    /*expand_from=*/6,
    encode_tile_with<Portable>,
    BlockAttention<Portable>::attend,
    BlockAttention<Portable>::expand,
    BlockAttention<Portable>::attend_expanded,
    BlockAttention<Portable>::merge,
    BlockAttention<Portable>::finish,
};

}  // namespace kvarn::cpu
