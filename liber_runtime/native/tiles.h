// The heavy parts of a score on a CPU. Each kernel computes what the function of the same name says
// (builders/models/functions.py), to rounding. The source is written once, with vector types of the compiler's, and
// compiled for several instruction sets: `Lanes` and `kRows` fill the registers of each.
//
// Rows are worked on in tiles: kRows rows times three vectors of columns stay in registers over a whole sum. Rows of a tile
// are sorted by user and by the length of the history, so that short histories cost less.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace liber {

// What every kernel returns: that it is done, or that an index lies outside of what it points into, and nothing was read.
constexpr int kDone = 0, kOutside = 1;

// sums[row][column] += rows[row][k] * weights[k][column], a tile of kRows rows times `columns` vectors.
// Not inlined: with the sums in variables of its own, the compiler keeps them in registers wherever it is called from.
template <int columns>
__attribute__((noinline)) void multiply(const float* const rows[kRows], const float* weights, int stride, int size,
                                        Lanes result[kRows][columns]) {
  Lanes sums[kRows][columns];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) sums[row][c] = result[row][c];
  for (int k = 0; k < size; ++k) {
    Lanes column[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) column[c] = *reinterpret_cast<const Unaligned*>(weights + c * kLanes);
    weights += stride;
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const float entry = rows[row][k];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) sums[row][c] += entry * column[c];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) result[row][c] = sums[row][c];
}

// A matrix float[out, in] as PyTorch has it, as [in, round_up(out)] with zeros behind: columns are vectors then.
struct Transposed {
  int stride;
  std::vector<float> values;

  Transposed(const float* weight, int out, int in) : stride(round_up(out)), values(size_t(in) * stride + kLanes) {
    for (int column = 0; column < out; ++column)
      for (int k = 0; k < in; ++k) at(k)[column] = weight[size_t(column) * in + k];
  }
  float* at(int k) { return values.data() + size_t(k) * stride; }
  const float* at(int k) const { return values.data() + size_t(k) * stride; }
};

inline std::vector<float> padded(const float* values, int size) {
  std::vector<float> longer(round_up(size), 0.0f);
  std::copy(values, values + size, longer.begin());
  return longer;
}

// Numbers of the rows in the order in which they are worked on: by user, users by length; so rows of a tile are alike.
inline std::vector<int> order_rows(const int32_t* user_index, const int32_t* length, int rows, int users, int steps) {
  std::vector<int> first(size_t(users) + 1, 0), by_length(steps + 2, 0), rank(users), order(rows);
  const auto real = [&](int user) { return std::clamp(length[user], 0, steps); };
  for (int user = 0; user < users; ++user) ++by_length[real(user) + 1];
  std::partial_sum(by_length.begin(), by_length.end(), by_length.begin());
  for (int user = 0; user < users; ++user) rank[user] = by_length[real(user)]++;
  for (int row = 0; row < rows; ++row) ++first[rank[user_index ? user_index[row] : row] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  for (int row = 0; row < rows; ++row) order[first[rank[user_index ? user_index[row] : row]]++] = row;
  return order;
}

// Whether all of `count` indices lie in [0, size).
inline bool inside(const int32_t* indices, size_t count, int size) {
  uint32_t highest = 0;
  for (size_t at = 0; at < count; ++at) highest = std::max(highest, static_cast<uint32_t>(indices[at]));
  return count == 0 || highest < static_cast<uint32_t>(size);
}

inline bool histories_inside(const int32_t* history, const int32_t* length, int users, int steps, int items) {
  for (int user = 0; user < users; ++user)
    if (!inside(history + size_t(user) * steps, std::clamp(length[user], 0, steps), items)) return false;
  return true;
}

// A tile of candidates with what belongs to their users.
struct Tile {
  int count = 0, steps = 0;
  int row[kRows], user[kRows], slot[kRows], length[kRows];

  Tile(const std::vector<int>& order, int begin, int end, const int32_t* user_index, const int32_t* lengths,
       int steps_at_most) {
    count = std::min(kRows, end - begin);
    for (int place = 0; place < kRows; ++place) {
      const int from = order[begin + std::min(place, count - 1)];  // the tile is filled up with its last row
      row[place] = from;
      user[place] = user_index ? user_index[from] : from;
      length[place] = std::clamp(lengths[user[place]], 0, steps_at_most);
      steps = std::max(steps, length[place]);
    }
  }
};

}  // namespace liber
