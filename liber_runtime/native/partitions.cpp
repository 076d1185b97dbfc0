// The attention fuser (LIBER, Eq. 5 and 6), user by user, without padding.

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace liber {
namespace {

// result[row] = rows[row] * weights for `count` rows that lie `row_stride` apart; `stride` floats are computed of each.
template <int columns>
void multiply_rows(const float* rows, int row_stride, int count, const float* weights, int stride, int size, int column,
                   float* result) {
  for (int first = 0; first < count; first += kRows) {
    const float* tile[kRows];
    for (int row = 0; row < kRows; ++row) tile[row] = rows + size_t(std::min(first + row, count - 1)) * row_stride;
    Lanes sums[kRows][columns] = {};
    multiply<columns>(tile, weights + column, stride, size, sums);
    for (int row = 0; row < std::min(kRows, count - first); ++row)
      for (int c = 0; c < columns; ++c) store(result + size_t(first + row) * stride + column + c * kLanes, sums[row][c]);
  }
}

void multiply_all(const float* rows, int row_stride, int count, const float* weights, int stride, int size,
                  float* result) {
  int column = 0;
  for (; column + 3 * kLanes <= stride; column += 3 * kLanes)
    multiply_rows<3>(rows, row_stride, count, weights, stride, size, column, result);
  for (; column + 2 * kLanes <= stride; column += 2 * kLanes)
    multiply_rows<2>(rows, row_stride, count, weights, stride, size, column, result);
  for (; column < stride; column += kLanes)
    multiply_rows<1>(rows, row_stride, count, weights, stride, size, column, result);
}

// The two matrices of the fuser, [in, round_up(out)] with zeros behind.
struct PartitionFuser {
  int size, width;
  std::vector<float> scores, value;

  PartitionFuser(const float* scores_, const float* value_, int size)
      : size(size), width(round_up(size)), scores(size_t(size) * width + kLanes), value(size_t(size) * width + kLanes) {
    for (int k = 0; k < size; ++k) {
      std::copy_n(scores_ + size_t(k) * size, size, scores.data() + size_t(k) * width);
      std::copy_n(value_ + size_t(k) * size, size, value.data() + size_t(k) * width);
    }
  }
};

}  // namespace
}  // namespace liber

using namespace liber;

extern "C" {

void* liber_fuser_new(const float* scores, const float* value, int size) {
  return new PartitionFuser(scores, value, size);
}
void liber_fuser_free(void* fuser) { delete static_cast<PartitionFuser*>(fuser); }

int liber_fuse_partitions(const void* weights, const float* representations, const int32_t* count, int rows, int users,
                          int threads, float* interest) {
  const PartitionFuser& fuser = *static_cast<const PartitionFuser*>(weights);
  std::vector<int> first(size_t(users) + 1, 0);
  int longest = 0;
  for (int user = 0; user < users; ++user) {
    if (count[user] < 0 || count[user] > rows - first[user]) return kOutside;
    first[user + 1] = first[user] + count[user];
    longest = std::max(longest, int(count[user]));
  }
  const Share share(users, threads);
  pool().run(share.tasks, threads, [&](int task) {
    const int size = fuser.size, most = round_up(longest);
    std::vector<float> queries(size_t(longest) * fuser.width), keys(size_t(size) * most + kLanes),
        scores(size_t(longest) * most), share_of(most), pooled(size), result(fuser.width);
    const int end = std::min(users, (task + 1) * share.size);
    for (int user = task * share.size; user < end; ++user) {
      const int own = count[user], width = round_up(own);
      const float* vectors = representations + size_t(first[user]) * size;
      float* to = interest + size_t(user) * size;
      std::fill_n(to, size, 0.0f);
      if (own == 0) continue;
      multiply_all(vectors, size, own, fuser.scores.data(), fuser.width, size, queries.data());
      for (int k = 0; k < size; ++k) {
        for (int place = 0; place < own; ++place) keys[size_t(k) * width + place] = vectors[size_t(place) * size + k];
        std::fill_n(keys.data() + size_t(k) * width + own, width - own, 0.0f);
      }
      multiply_all(queries.data(), fuser.width, own, keys.data(), width, size, scores.data());
      std::fill_n(share_of.data(), width, 0.0f);
      for (int row = 0; row < own; ++row) {
        float* of_row = scores.data() + size_t(row) * width;
        const float largest = *std::max_element(of_row, of_row + own);
        std::fill(of_row + own, of_row + width, largest - 80.0f);  // e^-80: nothing beside the largest
        Lanes total = {};
        for (int at = 0; at < width; at += kLanes) {
          const Lanes each = exponential(bounded(load(of_row + at) - largest, 80));
          store(of_row + at, each);
          total += each;
        }
        const float weight = 1.0f / (sum(total) * own);
        for (int at = 0; at < width; at += kLanes)
          store(share_of.data() + at, load(share_of.data() + at) + weight * load(of_row + at));
      }
      std::fill(pooled.begin(), pooled.end(), 0.0f);
      for (int place = 0; place < own; ++place)
        for (int k = 0; k < size; ++k) pooled[k] += share_of[place] * vectors[size_t(place) * size + k];
      multiply_all(pooled.data(), size, 1, fuser.value.data(), fuser.width, size, result.data());
      std::copy_n(result.data(), size, to);
    }
  });
  return kDone;
}

}  // extern "C"
