// Vectors of the compiler's: as many floats as a register of the instruction set holds.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace liber {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;  // 32 registers: 24 sums, 3 columns of weights, the rest
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4;  // 16 registers: 12 sums, 3 columns of weights, 1 entry
#else
constexpr int kLanes = 4, kRows = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

constexpr int round_up(int size) { return (size + kLanes - 1) / kLanes * kLanes; }

inline Lanes load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Unaligned*>(to) = value; }

inline float sum(Lanes value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

inline Lanes reciprocal(Lanes value) {
#if defined(__AVX512F__)
  const Lanes guess = (Lanes)_mm512_rcp14_ps((__m512)value);
  return guess * (2.0f - value * guess);  // one step of Newton's: 14 bits become 24
#else
  return 1.0f / value;
#endif
}

inline Lanes bounded(Lanes value, float bound) {
  const Lanes low = Lanes{} - bound, high = Lanes{} + bound;
#if defined(__AVX512F__)
  return (Lanes)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)value));
#else
  value = value < low ? low : value;
  return value > high ? high : value;
#endif
}

// e^x = 2^n 2^r with |r| <= 1/2, where the Taylor polynomial of degree 6 is off by 1.2e-7. For |x| up to 80.
inline Lanes exponential(Lanes x) {
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves n in the lowest bits
  const Lanes r = x * 1.44269504f - (shifted - 12582912.0f);
  Lanes p = r * 1.54035304e-4f + 1.33335581e-3f;
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  return p * (Lanes)(((Integers)shifted << 23) + 0x3f800000);
}

constexpr float kSaturated = 40;  // where a gate is 0 or 1 to rounding, and the products below stay finite

inline Lanes mask_after(int step, int length) {  // 1 for real steps of this vector, 0 behind them
  Lanes mask;
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = step + lane < length ? 1.0f : 0.0f;
  return mask;
}

// The vector of a row's feedback at `step`; what lies behind the row's end is not read.
inline Lanes load_steps(const float* row, int step, int steps) {
  if (step + kLanes <= steps) return load(row + step);
  Lanes value = {};
  for (int lane = 0; step + lane < steps; ++lane) value[lane] = row[step + lane];
  return value;
}

}  // namespace liber
