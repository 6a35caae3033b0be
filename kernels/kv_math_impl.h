// exp and log of sixteen floats, for the KV kernels. Included only by kv_kernels_<isa>.cpp.
#pragma once

namespace kvarn::cpu {

// exp(x) for x in [-87.3, 88]; 0 below; NaN stays NaN. About 1 ulp (Cody-Waite reduction by ln 2,
// then a polynomial on [-ln2/2, ln2/2] with the classic Cephes coefficients). kFused = false gives
// the same bits on every instruction set.
template <class S, bool kFused = true>
inline __attribute__((always_inline)) typename S::F exp_of(typename S::F x) {
  using F = typename S::F;
  const auto madd = [](F a, F b, F c) __attribute__((always_inline)) {
    if constexpr (kFused) {
      return S::fma(a, b, c);
    } else {
      return S::add(S::mul(a, b), c);
    }
  };
  const F lowest = S::set1(-87.3f);
  const F clamped = S::max(lowest, x);
  const F n = S::round(S::mul(clamped, S::set1(1.44269504f)));
  F r = madd(n, S::set1(-0.693359375f), clamped);
  r = madd(n, S::set1(2.12194440e-4f), r);
  F y = S::set1(1.9875691500e-4f);
  y = madd(y, r, S::set1(1.3981999507e-3f));
  y = madd(y, r, S::set1(8.3334519073e-3f));
  y = madd(y, r, S::set1(4.1665795894e-2f));
  y = madd(y, r, S::set1(1.6666665459e-1f));
  y = madd(y, r, S::set1(5.0000001201e-1f));
  y = S::add(madd(y, S::mul(r, r), r), S::set1(1.0f));
  return S::keep_unless_less(S::scale2(y, n), x, lowest);
}

// Natural logarithm of a positive normal x, about 1 ulp (Cephes); the same bits on every
// instruction set.
template <class S>
inline __attribute__((always_inline)) typename S::F log_of(typename S::F x) {
  using F = typename S::F;
  // mantissa in [sqrt(1/2), sqrt(2)): halve those above sqrt(2). (1 where m < sqrt(2), else 1/2)
  F m = S::mantissa(x), e = S::exponent(x);
  const F above =
      S::sub(S::set1(1.0f), S::keep_unless_less(S::set1(1.0f), S::set1(1.41421356f), m));  // 1 or 0
  m = S::mul(m, S::sub(S::set1(1.0f), S::mul(above, S::set1(0.5f))));
  e = S::add(e, above);
  const F f = S::sub(m, S::set1(1.0f));
  const F z = S::mul(f, f);
  const float c[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                     -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                     2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  F y = S::set1(c[0]);
  for (int i = 1; i < 9; ++i) y = S::add(S::mul(y, f), S::set1(c[i]));
  y = S::mul(S::mul(y, f), z);
  y = S::add(y, S::mul(e, S::set1(-2.12194440e-4f)));
  y = S::sub(y, S::mul(z, S::set1(0.5f)));
  return S::add(S::add(f, y), S::mul(e, S::set1(0.693359375f)));
}

}  // namespace kvarn::cpu
