// The coupling c = softmax over J of the logits, and its gradient, for all lanes at once; with exp, which the compiler
// has for numbers alone. Builds on lanes.h.
#pragma once

#include "lanes.h"

#include <limits>

namespace caps::cpu {

// degree: the first term left out, r^(degree+1) / (degree+1)! with |r| <= ln 2 / 2, is 7e-9 or 6e-18 of exp(r) at most,
//   less than half a unit in its last place
// lowest: 2^n stays normal, so that it can be put together from its bits
// round: 1.5 · 2^mantissa, beside which a number keeps no fraction: adding it rounds to an integer
// ln2_high: ln 2 to so few bits (15 or 36) that n ln2_high is exact; ln2_low is the rest of ln 2
template <class T>
struct ExpRange;
template <>
struct ExpRange<float> {
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float lowest = -87, round = 0x1.8p23f, log2e = 0x1.715476p0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};
template <>
struct ExpRange<double> {
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double lowest = -708, round = 0x1.8p52, log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
};

template <class T>
constexpr T inverse_factorial(int n) {
  T value = 1;
  for (int i = 2; i <= n; ++i)
    value /= i;
  return value;
}

// exp(x) for x <= 0, or NaN: 2^n exp(r) with x = n ln 2 + r. What would be subnormal is rounded up to the least normal.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  using R = ExpRange<T>;
  using IntVec = typename Simd<T>::IntVec;
  x = x < R::lowest ? Vec<T>{} + R::lowest : x;
  const Vec<T> shifted = x * R::log2e + R::round;  // n in the low bits of the mantissa
  const Vec<T> n = shifted - R::round;
  const Vec<T> r = (x - n * R::ln2_high) - n * R::ln2_low;
  Vec<T> y = Vec<T>{} + inverse_factorial<T>(R::degree);
#pragma GCC unroll 16
  for (int i = R::degree - 1; i >= 0; --i)
    y = y * r + inverse_factorial<T>(i);
  const IntVec power = ((IntVec)shifted << R::mantissa) + ((typename Simd<T>::Int)R::bias << R::mantissa);
  return y * (Vec<T>)power;  // a product, so that NaN stays NaN
}

// b -> c, over J. Less the largest logit no exp overflows, and the sum is 1 at least. A NaN is passed over by the
// maximum and returns through the sum.
template <class T>
inline void softmax(Vec<T>* b, int J) {
  Vec<T> largest = Vec<T>{} - std::numeric_limits<T>::infinity(), sum{};
  for (int j = 0; j < J; ++j)
    largest = b[j] > largest ? b[j] : largest;
  for (int j = 0; j < J; ++j) {
    b[j] = exp_nonpositive<T>(b[j] - largest);
    sum += b[j];
  }
  const Vec<T> inverse = 1 / sum;
  for (int j = 0; j < J; ++j)
    b[j] *= inverse;
}

// p -> h = c (p - Σ c p), the gradient with respect to the logits.
template <class T>
inline void softmax_backward(const Vec<T>* c, Vec<T>* p, int J) {
  Vec<T> mean{};
  for (int j = 0; j < J; ++j)
    mean += c[j] * p[j];
  for (int j = 0; j < J; ++j)
    p[j] = c[j] * (p[j] - mean);
}

}  // namespace caps::cpu
