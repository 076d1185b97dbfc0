// Gated recurrences (DIEN, https://arxiv.org/abs/1809.03672): a GRU, and an AUGRU whose update gate is scaled.

#pragma once

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace liber {

// The three gates' matrices float[3H, in] side by side for every vector of H: [H / kLanes][in][3][kLanes].
struct Gates {
  int groups, in;
  std::vector<float> values;

  Gates(const float* weight, int hidden, int in) : groups(round_up(hidden) / kLanes), in(in) {
    values.assign(size_t(groups) * in * 3 * kLanes, 0.0f);
    for (int gate = 0; gate < 3; ++gate)
      for (int unit = 0; unit < hidden; ++unit)
        for (int k = 0; k < in; ++k)
          values[((size_t(unit / kLanes) * in + k) * 3 + gate) * kLanes + unit % kLanes] =
              weight[(size_t(gate) * hidden + unit) * in + k];
  }
  const float* group(int g) const { return values.data() + size_t(g) * in * 3 * kLanes; }
};

// The biases of three gates, laid out like one row of `Gates`: [H / kLanes][3][kLanes].
inline std::vector<float> gate_biases(const float* bias, int hidden) {
  std::vector<float> values(size_t(round_up(hidden)) * 3, 0.0f);
  for (int gate = 0; gate < 3; ++gate)
    for (int unit = 0; unit < hidden; ++unit)
      values[(size_t(unit / kLanes) * 3 + gate) * kLanes + unit % kLanes] = bias[gate * hidden + unit];
  return values;
}

// One step of a tile: `inputs` are the gates' inputs, [H / kLanes][3][kLanes] a row; `weight` scales the update gate.
inline void step(const Gates& recurrent, const float* const inputs[kRows], const float* const state[kRows],
                 const float* weight, float* const next[kRows]) {
  for (int group = 0; group < recurrent.groups; ++group) {
    Lanes sums[kRows][3];
    const int at = 3 * group * kLanes;
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      sums[row][0] = load(inputs[row] + at);
      sums[row][1] = load(inputs[row] + at + kLanes);
      sums[row][2] = Lanes{};
    }
    multiply<3>(state, recurrent.group(group), 3 * kLanes, recurrent.in, sums);
    // next = before + weight * u * (c - before) with u = 1 / (1 + e^-update), c = tanh(given + r * state), r like u; u and c
    // are brought to one denominator. In two loops, for one such chain is too long to be overlapped with enough others.
    Lanes reset[kRows], update[kRows];
#pragma GCC unroll 1
    for (int row = 0; row < kRows; ++row) {
      update[row] = 1.0f + exponential(bounded(-sums[row][0], kSaturated));
      reset[row] = reciprocal(1.0f + exponential(bounded(-sums[row][1], kSaturated)));
    }
#pragma GCC unroll 1
    for (int row = 0; row < kRows; ++row) {
      const Lanes before = load(state[row] + group * kLanes), given = load(inputs[row] + at + 2 * kLanes);
      const Lanes candidate = 1.0f + exponential(bounded(2.0f * (given + reset[row] * sums[row][2]), kSaturated));
      const Lanes change = ((1.0f - before) * candidate - 2.0f) * reciprocal(update[row] * candidate);
      store(next[row] + group * kLanes, before + (weight ? weight[row] : 1.0f) * change);
    }
  }
}

// Inputs of the gates for up to kRows rows: [H / kLanes][3][kLanes] each.
inline void project(const Gates& gates, const std::vector<float>& bias, const float* const rows[kRows],
                    float* const projected[kRows], int count) {
  for (int group = 0; group < gates.groups; ++group) {
    Lanes sums[kRows][3];
    for (int row = 0; row < kRows; ++row)
      for (int gate = 0; gate < 3; ++gate) sums[row][gate] = load(bias.data() + (group * 3 + gate) * kLanes);
    multiply<3>(rows, gates.group(group), 3 * kLanes, gates.in, sums);
    for (int row = 0; row < count; ++row)
      for (int gate = 0; gate < 3; ++gate) store(projected[row] + (group * 3 + gate) * kLanes, sums[row][gate]);
  }
}

// Two buffers of states for a tile, and who reads which.
struct States {
  int size;
  std::vector<float> values;
  float* rows[2][kRows];

  explicit States(int hidden) : size(round_up(hidden)), values(size_t(2) * kRows * size) {
    for (int side = 0; side < 2; ++side)
      for (int row = 0; row < kRows; ++row) rows[side][row] = values.data() + (size_t(side) * kRows + row) * size;
  }
  void clear() { std::fill(values.begin(), values.end(), 0.0f); }
};

struct Recurrence {
  int hidden;
  Gates recurrent;

  Recurrence(const float* recurrent_weight, int hidden)
      : hidden(hidden), recurrent(recurrent_weight, hidden, hidden) {}
};

struct RecurrentLayer : Recurrence {
  Gates input;
  std::vector<float> bias;

  RecurrentLayer(const float* input_weight, const float* input_bias, const float* recurrent_weight, int hidden)
      : Recurrence(recurrent_weight, hidden),
        input(input_weight, hidden, hidden),
        bias(gate_biases(input_bias, hidden)) {}
};

// A row of gates' inputs, float[3H], as `step` reads them: [H / kLanes][3][kLanes].
inline void arrange(const float* row, int hidden, float* arranged) {
  for (int gate = 0; gate < 3; ++gate)
    for (int unit = 0; unit < hidden; unit += kLanes) {
      float* const to = arranged + (unit / kLanes * 3 + gate) * kLanes;
      if (unit + kLanes <= hidden)
        store(to, load(row + gate * hidden + unit));
      else
        std::copy_n(row + gate * hidden + unit, hidden - unit, to);
    }
}

}  // namespace liber
