// An MLP whose first layer adds what is the user's alone.

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace liber {
namespace {

// A hidden layer of an MLP: prelu(rows x weight + bias [+ addend]).
struct Layer {
  int in, out;
  Transposed weight;
  std::vector<float> bias;
  float slope;

  Layer(const float* weight, const float* bias, const float* slope, int in, int out)
      : in(in), out(out), weight(weight, out, in), bias(padded(bias, out)), slope(*slope) {}

  void run(const float* const rows[kRows], const float* const* addends, float* const outputs[kRows]) const {
    int column = 0;
    for (; column + 3 * kLanes <= this->weight.stride; column += 3 * kLanes) part<3>(rows, addends, outputs, column);
    for (; column < this->weight.stride; column += kLanes) part<1>(rows, addends, outputs, column);
  }

  template <int columns>
  void part(const float* const rows[kRows], const float* const* addends, float* const outputs[kRows],
            int column) const {
    Lanes sums[kRows][columns];
    for (int row = 0; row < kRows; ++row)
      for (int c = 0; c < columns; ++c) {
        sums[row][c] = load(bias.data() + column + c * kLanes);
        if (addends) sums[row][c] += load_steps(addends[row], column + c * kLanes, out);
      }
    multiply<columns>(rows, weight.at(0) + column, weight.stride, in, sums);
    for (int row = 0; row < kRows; ++row)
      for (int c = 0; c < columns; ++c) {
        const Lanes value = sums[row][c];
        store(outputs[row] + column + c * kLanes, value > 0.0f ? value : value * slope);
      }
  }
};

struct Perceptron {
  std::vector<Layer> layers;
  std::vector<float> logit;
  float bias;
  int widest = 0;

  // sizes: of the input, then of every hidden layer.
  Perceptron(const float* const* weights, const int32_t* sizes, int count)
      : logit(padded(weights[3 * count], sizes[count])), bias(*weights[3 * count + 1]) {
    for (int number = 0; number < count; ++number) {
      const float* const* own = weights + 3 * number;
      layers.emplace_back(own[0], own[1], own[2], sizes[number], sizes[number + 1]);
      widest = std::max(widest, round_up(sizes[number + 1]));
    }
  }
};

}  // namespace
}  // namespace liber

using namespace liber;

extern "C" {

void* liber_mlp_new(const float* const* weights, const int32_t* sizes, int layers) {
  return new Perceptron(weights, sizes, layers);
}
void liber_mlp_free(void* mlp) { delete static_cast<Perceptron*>(mlp); }

int liber_folded_mlp(const void* weights, const float* candidate, const float* user, const int32_t* user_index,
                     int rows, int users, int threads, float* logits) {
  if (!inside(user_index, rows, users)) return kOutside;
  const Perceptron& mlp = *static_cast<const Perceptron*>(weights);
  const Share share(rows, threads);
  pool().run(share.tasks, threads, [&](int task) {
    std::vector<float> buffers[2] = {std::vector<float>(size_t(kRows) * mlp.widest),
                                     std::vector<float>(size_t(kRows) * mlp.widest)};
    const int end = std::min(rows, (task + 1) * share.size);
    for (int begin = task * share.size; begin < end; begin += kRows) {
      const int count = std::min(kRows, end - begin);
      const float *inputs[kRows], *addends[kRows];
      for (int place = 0; place < kRows; ++place) {
        const int row = begin + std::min(place, count - 1);
        inputs[place] = candidate + size_t(row) * mlp.layers[0].in;
        addends[place] = user + size_t(user_index[row]) * mlp.layers[0].out;
      }
      for (size_t number = 0; number < mlp.layers.size(); ++number) {
        float* outputs[kRows];
        for (int place = 0; place < kRows; ++place)
          outputs[place] = buffers[number % 2].data() + size_t(place) * mlp.widest;
        mlp.layers[number].run(inputs, number ? nullptr : addends, outputs);
        for (int place = 0; place < kRows; ++place) inputs[place] = outputs[place];
      }
      for (int place = 0; place < count; ++place) {
        Lanes total = {};
        for (size_t at = 0; at < mlp.logit.size(); at += kLanes)
          total += load(inputs[place] + at) * load(mlp.logit.data() + at);
        logits[begin + place] = sum(total) + mlp.bias;
      }
    }
  });
  return kDone;
}

}  // extern "C"
