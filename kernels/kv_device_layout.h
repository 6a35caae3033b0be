// How a page lies in GPU memory: the bytes of kv_layout.h in another order, a bijection, so that
// tensor-core kernels read them without shuffles (tests/kernels/cuda/kv_device_layout_test.cpp).
//
// A coded tile keeps the fields of TileLayout at their offsets; inside a field the order is that of
// the fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments"), whose lane is 4*g + q, g in 0..7,
// q in 0..3. A 16-byte load by each lane then brings the A operand of several MMAs.
//   K codes: [token tile 8][half 2][lane 32][16 B]; 32-bit word w of half h is the k-step s = 4h +
//   w
//            (16 channels) of S^T = K q^T: token = 16 tile + g + 8 r0, channel = 16 s + 8 r1 + 2q +
//            c, 4 bits at 16 c + 8 r0 + 4 r1.
//   V codes, 2 bits: [channel tile 8][lane 32][16 B]; word w holds the k-steps 2w and 2w + 1 (16
//            tokens each) of O^T = V^T p^T: channel = 16 tile + g + 8 r0,
//            token = 16 (2w + f) + 8 r1 + 2q + c, 2 bits at 16 c + 8 r0 + 4 f + 2 r1.
//   V codes, 4 bits: as K with channels and tokens exchanged.
//   Scales along the k axis (K step and zero over channels; V step and zero over tokens):
//            [k-step pair 4][q 4][k-step 2][r1 2][c 2] fp16.
//   Scales along the m axis (K token scale over tokens; V channel scale over channels):
//            [g 8][tile 8][r0 2] fp16.
//
// An exact page has its rows in order; the 16-byte pieces of row r are permuted by XOR with r & 7,
// so that ldmatrix meets no bank conflict after a plain copy to shared memory.
#pragma once

#include "kernels/kv_layout.h"

namespace kvarn {

struct CodePlace {
  int byte;   // within the field
  int shift;  // of the code's lowest bit within that byte
};

namespace detail {
constexpr CodePlace place_of_bit(int word_byte, int bit) { return {word_byte + bit / 8, bit % 8}; }
// 4-bit codes: m is the MMA's row axis (tokens of K, channels of V), k its depth.
constexpr CodePlace nibble_place(int m, int k) {
  const int tile = m / 16, r0 = m / 8 % 2, g = m % 8;
  const int step = k / 16, r1 = k / 8 % 2, q = k % 8 / 2, c = k % 2;
  const int lane = 4 * g + q, half = step / 4, word = step % 4;
  return place_of_bit(((tile * 2 + half) * 32 + lane) * 16 + 4 * word, 16 * c + 8 * r0 + 4 * r1);
}
}  // namespace detail

// In the field TileLayout::k_codes.
constexpr CodePlace device_k_code(int channel, int token) {
  return detail::nibble_place(token, channel);
}
// In the field TileLayout::v_codes, of `bits` 2 or 4.
constexpr CodePlace device_v_code(int bits, int token, int channel) {
  if (bits == 4) return detail::nibble_place(channel, token);
  const int tile = channel / 16, r0 = channel / 8 % 2, g = channel % 8;
  const int step = token / 16, r1 = token / 8 % 2, q = token % 8 / 2, c = token % 2;
  const int lane = 4 * g + q, word = step / 2, f = step % 2;
  return detail::place_of_bit((tile * 32 + lane) * 16 + 4 * word, 16 * c + 8 * r0 + 4 * f + 2 * r1);
}
// Index of entry k of a scale vector along the k axis: k_step, k_zero (channels), v_step, v_zero
// (tokens).
constexpr int device_depth_scale(int k) {
  const int step = k / 16, r1 = k / 8 % 2, q = k % 8 / 2, c = k % 2;
  return (((step / 2 * 4 + q) * 2 + step % 2) * 2 + r1) * 2 + c;
}
// Index of entry m of a scale vector along the m axis: k_token (tokens), v_channel (channels).
constexpr int device_row_scale(int m) { return (m % 8 * 8 + m / 16) * 2 + m / 8 % 2; }

// Byte offset of the 16-byte piece `piece` (8 halves) of a row, within the row.
constexpr int device_exact_piece(int row, int piece) { return (piece ^ (row & 7)) * 16; }

}  // namespace kvarn
