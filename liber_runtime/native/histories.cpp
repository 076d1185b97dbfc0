// What is made of the histories of users alone.

#include <algorithm>
#include <vector>

#include "tiles.h"

using namespace liber;

extern "C" {

int liber_residuals(const float* item_mean, const float* feedback, const int32_t* history, const int32_t* given,
                    const int32_t* length, float prior, int items, int buckets, int users, int steps, int threads,
                    float* residual) {
  if (!histories_inside(history, length, users, steps, items) ||
      !histories_inside(given, length, users, steps, buckets))
    return kOutside;
  const Share share(users, threads);
  pool().run(share.tasks, threads, [&](int task) {
    const int end = std::min(users, (task + 1) * share.size);
    for (int user = task * share.size; user < end; ++user) {
      const int real = std::clamp(length[user], 0, steps);
      const int32_t* const item = history + size_t(user) * steps;
      const int32_t* const bucket = given + size_t(user) * steps;
      float* const row = residual + size_t(user) * steps;
      float total = 0;
      for (int step = 0; step < real; ++step) total += row[step] = feedback[bucket[step]] - item_mean[item[step]];
      const float own = total / (real + prior);
      for (int step = 0; step < real; ++step) row[step] -= own;
      std::fill(row + real, row + steps, 0.0f);
    }
  });
  return kDone;
}

int liber_fold_in(const float* vectors, const int32_t* history, const int32_t* length, const float* residual,
                  float noise, int items, int size, int iterations, int users, int steps, int threads, float* taste) {
  if (!histories_inside(history, length, users, steps, items)) return kOutside;
  const int width = round_up(size), blocks = width / kLanes;
  const Share share(users, threads);
  pool().run(share.tasks, threads, [&](int task) {
    std::vector<float> gram(size_t(size) * width), buffers(size_t(5) * width);
    float *row = buffers.data(), *rest = row + width, *direction = rest + width, *image = direction + width,
          *solution = image + width;
    const auto dot = [&](const float* left, const float* right) {
      Lanes total = {};
      for (int block = 0; block < blocks; ++block)
        total += load(left + block * kLanes) * load(right + block * kLanes);
      return sum(total);
    };
    const auto add = [&](float* to, float factor, const float* from) {
      for (int at = 0; at < width; at += kLanes) store(to + at, load(to + at) + factor * load(from + at));
    };
    const int end = std::min(users, (task + 1) * share.size);
    for (int user = task * share.size; user < end; ++user) {
      std::fill(gram.begin(), gram.end(), 0.0f);
      std::fill(buffers.begin(), buffers.end(), 0.0f);
      for (int step = 0; step < std::min(length[user], steps); ++step) {
        std::copy_n(vectors + size_t(history[size_t(user) * steps + step]) * size, size, row);
        for (int k = 0; k < size; ++k) add(gram.data() + size_t(k) * width, row[k], row);
        add(rest, residual[size_t(user) * steps + step], row);
      }
      std::copy_n(rest, width, direction);
      float squared = dot(rest, rest);
      for (int iteration = 0; iteration < iterations; ++iteration) {
        for (int at = 0; at < width; at += kLanes) store(image + at, noise * load(direction + at));
        for (int k = 0; k < size; ++k) add(image, direction[k], gram.data() + size_t(k) * width);
        const float along = squared / std::max(dot(direction, image), 1e-12f);
        add(solution, along, direction);
        add(rest, -along, image);
        const float shorter = dot(rest, rest), kept = shorter / std::max(squared, 1e-12f);
        for (int at = 0; at < width; at += kLanes)
          store(direction + at, load(rest + at) + kept * load(direction + at));
        squared = shorter;
      }
      std::copy_n(solution, size, taste + size_t(user) * size);
    }
  });
  return kDone;
}

int liber_pool_history(const float* item_table, const float* feedback_table, const int32_t* history,
                       const int32_t* given, const int32_t* length, const float* value, int items, int item_width,
                       int buckets, int feedback_width, int users, int steps, int threads, float* pooled) {
  if (!histories_inside(history, length, users, steps, items) ||
      !histories_inside(given, length, users, steps, buckets))
    return kOutside;
  const Share share(users, threads);
  const int width = 2 * item_width + feedback_width;
  pool().run(share.tasks, threads, [&](int task) {
    const int end = std::min(users, (task + 1) * share.size);
    for (int user = task * share.size; user < end; ++user) {
      float* const mean = pooled + size_t(user) * width;
      float* const mean_feedback = mean + item_width;
      float* const weighted = mean_feedback + feedback_width;
      std::fill_n(mean, width, 0.0f);
      const int real = std::clamp(length[user], 0, steps);
      const float share_of_step = 1.0f / std::max(real, 1);
      for (int step = 0; step < real; ++step) {
        const size_t at = size_t(user) * steps + step;
        const float* const item = item_table + size_t(history[at]) * item_width;
        const float* const feedback = feedback_table + size_t(given[at]) * feedback_width;
        const float weight = value[at] * share_of_step;
        for (int k = 0; k < item_width; ++k) mean[k] += share_of_step * item[k];
        for (int k = 0; k < item_width; ++k) weighted[k] += weight * item[k];
        for (int k = 0; k < feedback_width; ++k) mean_feedback[k] += share_of_step * feedback[k];
      }
    }
  });
  return kDone;
}

int liber_map_history(const float* item_table, const float* feedback_table, const int32_t* history,
                      const int32_t* given, int items, int buckets, int width, int users, int steps, int threads,
                      float* mapped) {
  if (!inside(history, size_t(users) * steps, items) || !inside(given, size_t(users) * steps, buckets))
    return kOutside;
  const Share share(users, threads);
  pool().run(share.tasks, threads, [&](int task) {
    const int begin = task * share.size, end = std::min(users, begin + share.size);
    for (int step = 0; step < steps; ++step)
      for (int user = begin; user < end; ++user) {
        const size_t at = size_t(user) * steps + step;
        const float* const item = item_table + size_t(history[at]) * width;
        const float* const feedback = feedback_table + size_t(given[at]) * width;
        float* const to = mapped + (size_t(step) * users + user) * width;
        for (int k = 0; k < width; ++k) to[k] = item[k] + feedback[k];
      }
  });
  return kDone;
}

}  // extern "C"
