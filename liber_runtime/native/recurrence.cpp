#include "recurrence.h"

#include <algorithm>
#include <vector>

using namespace liber;

extern "C" {

// Weights laid out for the kernels: made once, used by any thread.
void* liber_recurrence_new(const float* recurrent_weight, int hidden) {
  return new Recurrence(recurrent_weight, hidden);
}
void liber_recurrence_free(void* layer) { delete static_cast<Recurrence*>(layer); }

void* liber_recurrent_new(const float* input_weight, const float* input_bias, const float* recurrent_weight,
                          int hidden) {
  return new RecurrentLayer(input_weight, input_bias, recurrent_weight, hidden);
}
void liber_recurrent_free(void* layer) { delete static_cast<RecurrentLayer*>(layer); }

int liber_gru(const void* weights, const float* inputs, const int32_t* length, int steps, int users, int threads,
              float* states) {
  const Recurrence& layer = *static_cast<const Recurrence*>(weights);
  const std::vector<int> order = order_rows(nullptr, length, users, users, steps);
  const Share share(users, threads);
  pool().run(share.tasks, threads, [&](int task) {
    States state(layer.hidden);
    const int width = 3 * kLanes * layer.recurrent.groups;
    std::vector<float> projected(size_t(kRows) * width);
    const int end = std::min(users, (task + 1) * share.size);
    for (int begin = task * share.size; begin < end; begin += kRows) {
      const Tile tile(order, begin, end, nullptr, length, steps);
      state.clear();
      for (int number = 0; number < tile.steps; ++number) {
        float* gates[kRows];
        for (int place = 0; place < kRows; ++place) {
          gates[place] = projected.data() + size_t(place) * width;
          arrange(inputs + (size_t(number) * users + tile.user[place]) * 3 * layer.hidden, layer.hidden, gates[place]);
        }
        float* const* after = state.rows[1 - number % 2];
        step(layer.recurrent, gates, state.rows[number % 2], nullptr, after);
        for (int place = 0; place < tile.count; ++place)
          if (number < tile.length[place])
            std::copy_n(after[place], layer.hidden,
                        states + (size_t(number) * users + tile.user[place]) * layer.hidden);
      }
    }
  });
  return kDone;
}

}  // extern "C"
