// What of a history is like a candidate, and what feedback that had.

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace liber {
namespace {

// The sums of the entries of kLanes vectors, as one vector.
inline Lanes sum_each(Lanes values[kLanes]) {
  // Halves: adjacent vectors are added crosswise until each lane holds the sum of one of them.
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    Integers left, right;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int within = lane % (2 * width);
      const int base = lane - within;
      left[lane] = within < width ? base + within : kLanes + base + within - width;
      right[lane] = left[lane] + width;
    }
    for (int pair = 0; pair < width; ++pair) {
      const Lanes a = values[pair], b = values[pair + width];
      values[pair] = __builtin_shuffle(a, b, left) + __builtin_shuffle(a, b, right);
    }
  }
  return values[0];
}

// Likeness of one item to the items of a history, likeness[step], by rows of a table whose width is whole vectors.
void compare(const float* table, int width, int item, const int32_t* history, int length, float* likeness) {
  const float* candidate = table + size_t(item) * width;
  for (int step = 0; step < length; step += kLanes) {
    Lanes sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* row = table + size_t(history[std::min(step + lane, length - 1)]) * width;
      const int ahead = std::min(step + lane + kLanes, length - 1);
      const char* next = reinterpret_cast<const char*>(table + size_t(history[ahead]) * width);
      for (int byte = 0; byte < 4 * width; byte += 64) __builtin_prefetch(next + byte);
      Lanes total = load(candidate) * load(row);
      for (int k = kLanes; k < width; k += kLanes) total += load(candidate + k) * load(row + k);
      sums[lane] = total;
    }
    store(likeness + step, sum_each(sums));
  }
}

// A history's rows of a table as columns: [width][round_up(length)], for users with several candidates.
void gather_columns(const float* table, int width, const int32_t* history, int length, float* columns) {
  const int stride = round_up(length);
  for (int step = 0; step < stride; ++step) {
    const float* row = table + size_t(history[std::min(step, length - 1)]) * width;
    for (int k = 0; k < width; ++k) columns[size_t(k) * stride + step] = row[k];
  }
}

template <int columns>
void compare_tile(const float* const rows[kRows], const float* history, int stride, int width, int at, float* likeness,
                  int likeness_stride, int count) {
  Lanes sums[kRows][columns] = {};
  multiply<columns>(rows, history + at, stride, width, sums);
  for (int row = 0; row < count; ++row)
    for (int c = 0; c < columns; ++c) store(likeness + row * likeness_stride + at + c * kLanes, sums[row][c]);
}

constexpr int kSharedByAtLeast = 3;  // candidates of a user for which gathering its columns pays

// Calls finish(row, user, length, likeness) for every row; likeness has room for round_up(length) entries.
template <typename Finish>
void for_each_likeness(const float* table, int width, const int32_t* item, const int32_t* history,
                       const int32_t* length, const int32_t* user_index, int rows, int users, int steps, int threads,
                       Finish&& finish) {
  const std::vector<int> order = order_rows(user_index, length, rows, users, steps);
  const int room = round_up(steps);
  const Share share(rows, threads);
  pool().run(share.tasks, threads, [&](int task) {
    std::vector<float> likeness(size_t(kRows) * room), columns;
    const int end = std::min(rows, (task + 1) * share.size);
    for (int begin = task * share.size; begin < end;) {
      const int user = user_index ? user_index[order[begin]] : order[begin];
      const int32_t* steps_of_user = history + size_t(user) * steps;
      const int real = std::clamp(length[user], 0, steps);
      int until = begin + 1;
      while (until < end && user_index && user_index[order[until]] == user) ++until;
      if (real == 0 || until - begin < kSharedByAtLeast) {
        for (; begin < until; ++begin) {
          compare(table, width, item[order[begin]], steps_of_user, real, likeness.data());
          finish(order[begin], user, real, likeness.data());
        }
        continue;
      }
      const int stride = round_up(real);
      columns.resize(size_t(width) * room + 2 * kLanes);
      gather_columns(table, width, steps_of_user, real, columns.data());
      for (; begin < until; begin += kRows) {
        const int count = std::min(kRows, until - begin);
        const float* candidates[kRows];
        for (int place = 0; place < kRows; ++place)
          candidates[place] = table + size_t(item[order[begin + std::min(place, count - 1)]]) * width;
        int at = 0;
        for (; at + 3 * kLanes <= stride; at += 3 * kLanes)
          compare_tile<3>(candidates, columns.data(), stride, width, at, likeness.data(), room, count);
        for (; at < stride; at += kLanes)
          compare_tile<1>(candidates, columns.data(), stride, width, at, likeness.data(), room, count);
        for (int place = 0; place < count; ++place)
          finish(order[begin + place], user, real, likeness.data() + size_t(place) * room);
      }
      begin = until;
    }
  });
}

}  // namespace
}  // namespace liber

using namespace liber;

extern "C" {

int liber_similar_feedback(const float* table, const int32_t* item, const int32_t* history, const int32_t* length,
                           const float* feedback, const int32_t* user_index, int items, int width, int rows, int users,
                           int steps, int threads, float* similar) {
  if (!inside(item, rows, items) || !inside(user_index, rows, users) ||
      !histories_inside(history, length, users, steps, items))
    return kOutside;
  for_each_likeness(table, width, item, history, length, user_index, rows, users, steps, threads,
                    [&](int row, int user, int real, const float* likeness) {
                      Lanes weights = {}, weighed = {}, products = {};
                      const float* given = feedback + size_t(user) * steps;
                      for (int step = 0; step < real; step += kLanes) {
                        Lanes like = load(likeness + step);
                        if (step + kLanes > real) like *= mask_after(step, real);
                        const Lanes value = load_steps(given, step, steps);
                        const Lanes positive = like > 0.0f ? like : Lanes{};
                        weights += positive * positive;
                        weighed += positive * positive * value;
                        products += like * value;
                      }
                      similar[3 * row] = sum(weights);
                      similar[3 * row + 1] = sum(weighed);
                      similar[3 * row + 2] = sum(products);
                    });
  return kDone;
}

int liber_alike_feedback(const float* table, const int32_t* item, const int32_t* history, const int32_t* length,
                         const float* feedback, const int32_t* user_index, const float* sharpness, int kinds, int items,
                         int width, int rows, int users, int steps, int threads, float* alike) {
  if (!inside(item, rows, items) || !inside(user_index, rows, users) ||
      !histories_inside(history, length, users, steps, items))
    return kOutside;
  for_each_likeness(table, width, item, history, length, user_index, rows, users, steps, threads,
                    [&](int row, int user, int real, const float* likeness) {
                      float* result = alike + size_t(row) * (1 + 2 * kinds);
                      const float* given = feedback + size_t(user) * steps;
                      Lanes total = {};
                      for (int step = 0; step < real; step += kLanes) {
                        const Lanes like = load(likeness + step);
                        total += step + kLanes > real ? like * mask_after(step, real) : like;
                      }
                      result[0] = sum(total);
                      for (int kind = 0; kind < kinds; ++kind) {
                        Lanes weights = {}, weighed = {};
                        for (int step = 0; step < real; step += kLanes) {
                          Lanes weight = exponential(bounded(sharpness[kind] * (load(likeness + step) - 1.0f), 80));
                          if (step + kLanes > real) weight *= mask_after(step, real);
                          weights += weight;
                          weighed += weight * load_steps(given, step, steps);
                        }
                        result[1 + 2 * kind] = sum(weights);
                        result[2 + 2 * kind] = sum(weighed);
                      }
                    });
  return kDone;
}

}  // extern "C"
