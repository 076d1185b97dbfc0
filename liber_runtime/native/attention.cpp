// The local activation unit (DIN, https://arxiv.org/abs/1706.06978) and what follows it: a sum, or DIEN's AUGRU.

#include <algorithm>
#include <vector>

#include "recurrence.h"
#include "tiles.h"

namespace liber {
namespace {

struct Activation {
  int hidden, units;  // units: rounded up
  Transposed query, key, product;
  std::vector<float> bias, score;
  float slope;

  Activation(const float* query, const float* query_bias, const float* key, const float* product, const float* slope,
             const float* score, int hidden, int units)
      : hidden(hidden),
        units(round_up(units)),
        query(query, units, hidden),
        key(key, units, hidden),
        product(product, units, hidden),
        bias(padded(query_bias, units)),
        score(padded(score, units)),
        slope(*slope) {}

  // rows x matrix (+ bias) for up to kRows rows.
  static void map(const float* const rows[kRows], const Transposed& matrix, const float* bias, int in, int out,
                  float* const mapped[kRows], int count) {
    for (int column = 0; column < out; column += kLanes) {
      Lanes sums[kRows][1];
      for (int row = 0; row < kRows; ++row) sums[row][0] = bias ? load(bias + column) : Lanes{};
      multiply<1>(rows, matrix.at(0) + column, matrix.stride, in, sums);
      for (int row = 0; row < count; ++row) store(mapped[row] + column, sums[row][0]);
    }
  }

  template <int columns>
  void add(const float* const products[kRows], const float* const queries[kRows], const float* const keys[kRows],
           int column, Lanes totals[kRows]) const {
    Lanes sums[kRows][columns];
    for (int row = 0; row < kRows; ++row)
      for (int c = 0; c < columns; ++c)
        sums[row][c] = load(queries[row] + column + c * kLanes) + load(keys[row] + column + c * kLanes);
    multiply<columns>(products, product.at(0) + column, product.stride, hidden, sums);
    for (int row = 0; row < kRows; ++row)
      for (int c = 0; c < columns; ++c) {
        const Lanes value = sums[row][c];
        totals[row] += (value > 0.0f ? value : value * slope) * load(score.data() + column + c * kLanes);
      }
  }

  // The scores of one step for a tile; `products` are query times key, entry by entry.
  void scores(const float* const products[kRows], const float* const queries[kRows], const float* const keys[kRows],
              float result[kRows]) const {
    Lanes totals[kRows] = {};
    int column = 0;
    for (; column + 2 * kLanes <= units; column += 2 * kLanes) add<2>(products, queries, keys, column, totals);
    if (column < units) add<1>(products, queries, keys, column, totals);
    for (int row = 0; row < kRows; ++row) result[row] = sum(totals[row]);
  }
};

// What a thread knows of the users of a tile: the parts of attention and AUGRU that are the user's alone.
struct UserParts {
  std::vector<int> users;          // in the slots, in order
  std::vector<float> keys, gates;  // [slot][step][units], [slot][step][3 * H]
};


// Scores of all steps of a tile: scores[place][step]; the products' buffer holds kRows * hidden floats.
template <typename Keys>
void attend(const Activation& activation, const Tile& tile, const float* const query[kRows],
            const float* const query_units[kRows], const float* states, int users, Keys&& keys_of, float* products,
            float* scores, int stride) {
  const int hidden = activation.hidden;
  const float* product_rows[kRows];
  for (int place = 0; place < kRows; ++place) product_rows[place] = products + place * hidden;
  for (int step = 0; step < tile.steps; ++step) {
    const float* key_units[kRows];
    float result[kRows];
    for (int place = 0; place < kRows; ++place) {
      const float* key = states + (size_t(step) * users + tile.user[place]) * hidden;
      float* product = products + place * hidden;
      for (int k = 0; k < hidden; ++k) product[k] = query[place][k] * key[k];
      key_units[place] = keys_of(place, std::min(step, std::max(0, tile.length[place] - 1)));
    }
    activation.scores(product_rows, query_units, key_units, result);
    for (int place = 0; place < kRows; ++place) scores[place * stride + step] = result[place];
  }
}

// Softmax over the first `length` of `scores`, 0 behind them up to `steps`.
void softmax(float* scores, int length, int steps) {
  float highest = -1e30f, total = 0;
  for (int step = 0; step < length; ++step) highest = std::max(highest, scores[step]);
  for (int step = 0; step < length; step += kLanes) {
    Lanes value = {};
    for (int lane = 0; lane < kLanes && step + lane < length; ++lane)
      value[lane] = std::max(scores[step + lane] - highest, -80.0f);
    value = exponential(value);
    for (int lane = 0; lane < kLanes && step + lane < length; ++lane) total += scores[step + lane] = value[lane];
  }
  for (int step = 0; step < length; ++step) scores[step] /= total;
  for (int step = length; step < steps; ++step) scores[step] = 0;
}

// Fills the slots of a tile's users; a user that the tile before ended with keeps what was made of it.
void prepare_users(Tile& tile, UserParts& parts, const Activation& activation, const Gates* gates,
                   const std::vector<float>& gate_bias, const float* states, int users, int steps) {
  const int hidden = activation.hidden, units = activation.units, width = gates ? 3 * kLanes * gates->groups : 0;
  if (parts.keys.empty()) {
    parts.keys.resize(size_t(kRows) * steps * units);
    parts.gates.resize(size_t(kRows) * steps * width);
  }
  if (!parts.users.empty() && parts.users.back() == tile.user[0]) {
    const int last = int(parts.users.size()) - 1;
    if (last > 0) {
      const int length = tile.length[0];
      std::copy_n(parts.keys.data() + size_t(last) * steps * units, size_t(length) * units, parts.keys.data());
      std::copy_n(parts.gates.data() + size_t(last) * steps * width, size_t(length) * width, parts.gates.data());
    }
    parts.users.assign(1, tile.user[0]);
  } else {
    parts.users.clear();
  }
  const float* rows[kRows];
  float *key_rows[kRows], *gate_rows[kRows];
  int waiting = 0;
  const auto flush = [&] {
    if (!waiting) return;
    for (int place = waiting; place < kRows; ++place) rows[place] = rows[0];
    Activation::map(rows, activation.key, nullptr, hidden, units, key_rows, waiting);
    if (gates) project(*gates, gate_bias, rows, gate_rows, waiting);
    waiting = 0;
  };
  for (int place = 0; place < tile.count; ++place) {
    if (parts.users.empty() || parts.users.back() != tile.user[place]) {
      parts.users.push_back(tile.user[place]);
      const int slot = int(parts.users.size()) - 1;
      for (int step = 0; step < tile.length[place]; ++step) {
        rows[waiting] = states + (size_t(step) * users + tile.user[place]) * hidden;
        key_rows[waiting] = parts.keys.data() + (size_t(slot) * steps + step) * units;
        gate_rows[waiting] = parts.gates.data() + (size_t(slot) * steps + step) * width;
        if (++waiting == kRows) flush();
      }
    }
    tile.slot[place] = int(parts.users.size()) - 1;
  }
  for (int place = tile.count; place < kRows; ++place) tile.slot[place] = tile.slot[tile.count - 1];
  flush();
}

// A tile's queries: as they are, and through the query's part of the activation unit.
struct Queries {
  const float* rows[kRows];
  const float* units[kRows];
  std::vector<float> mapped;

  explicit Queries(const Activation& activation) : mapped(size_t(kRows) * activation.units) {}
  void take(const Activation& activation, const Tile& tile, const float* query) {
    float* to[kRows];
    for (int place = 0; place < kRows; ++place) {
      rows[place] = query + size_t(tile.row[place]) * activation.hidden;
      units[place] = to[place] = mapped.data() + size_t(place) * activation.units;
    }
    Activation::map(rows, activation.query, activation.bias.data(), activation.hidden, activation.units, to, kRows);
  }
};

// What one thread needs to score tiles of candidates against the steps of their users.
struct Attending {
  UserParts parts;
  Queries queries;
  std::vector<float> products, scores;  // scores: [kRows][steps]

  Attending(const Activation& activation, int steps)
      : queries(activation), products(size_t(kRows) * activation.hidden), scores(size_t(kRows) * std::max(steps, 1)) {}

  void score(const Activation& activation, Tile& tile, const RecurrentLayer* layer, const float* query,
             const float* states, int users, int steps) {
    static const std::vector<float> none;
    prepare_users(tile, parts, activation, layer ? &layer->input : nullptr, layer ? layer->bias : none, states, users,
                  steps);
    queries.take(activation, tile, query);
    const auto keys_of = [&](int place, int step_number) {
      return parts.keys.data() + (size_t(tile.slot[place]) * steps + step_number) * activation.units;
    };
    attend(activation, tile, queries.rows, queries.units, states, users, keys_of, products.data(), scores.data(),
           steps);
  }
};

}  // namespace
}  // namespace liber

using namespace liber;

extern "C" {

void* liber_activation_new(const float* query, const float* query_bias, const float* key, const float* product,
                           const float* slope, const float* score, int hidden, int units) {
  return new Activation(query, query_bias, key, product, slope, score, hidden, units);
}
void liber_activation_free(void* activation) { delete static_cast<Activation*>(activation); }

int liber_interest_evolution(const void* unit, const void* weights, const float* query, const float* states,
                             const int32_t* length, const int32_t* user_index, int rows, int users, int steps,
                             int threads, float* evolved) {
  if (!inside(user_index, rows, users)) return kOutside;
  const Activation& activation = *static_cast<const Activation*>(unit);
  const RecurrentLayer& layer = *static_cast<const RecurrentLayer*>(weights);
  const std::vector<int> order = order_rows(user_index, length, rows, users, steps);
  const Share share(rows, threads);
  pool().run(share.tasks, threads, [&](int task) {
    States state(layer.hidden);
    Attending attending(activation, steps);
    const int width = 3 * kLanes * layer.input.groups;
    const int end = std::min(rows, (task + 1) * share.size);
    for (int begin = task * share.size; begin < end; begin += kRows) {
      Tile tile(order, begin, end, user_index, length, steps);
      attending.score(activation, tile, &layer, query, states, users, steps);
      for (int place = 0; place < kRows; ++place)
        softmax(attending.scores.data() + size_t(place) * steps, tile.length[place], tile.steps);
      state.clear();
      for (int number = 0; number < tile.steps; ++number) {
        const float* gates[kRows];
        float weight[kRows];
        for (int place = 0; place < kRows; ++place) {
          const int real = std::min(number, std::max(0, tile.length[place] - 1));
          gates[place] = attending.parts.gates.data() + (size_t(tile.slot[place]) * steps + real) * width;
          weight[place] = attending.scores[size_t(place) * steps + number];
        }
        step(layer.recurrent, gates, state.rows[number % 2], weight, state.rows[1 - number % 2]);
      }
      for (int place = 0; place < tile.count; ++place)
        std::copy_n(state.rows[tile.steps % 2][place], layer.hidden, evolved + size_t(tile.row[place]) * layer.hidden);
    }
  });
  return kDone;
}

int liber_local_activation(const void* unit, float score_bias, int normalized, const float* query, const float* states,
                           const int32_t* length, const int32_t* user_index, int rows, int users, int steps,
                           int threads, float* pooled) {
  if (!inside(user_index, rows, users)) return kOutside;
  const Activation& activation = *static_cast<const Activation*>(unit);
  const std::vector<int> order = order_rows(user_index, length, rows, users, steps);
  const Share share(rows, threads);
  pool().run(share.tasks, threads, [&](int task) {
    Attending attending(activation, steps);
    const int hidden = activation.hidden, end = std::min(rows, (task + 1) * share.size);
    for (int begin = task * share.size; begin < end; begin += kRows) {
      Tile tile(order, begin, end, user_index, length, steps);
      attending.score(activation, tile, nullptr, query, states, users, steps);
      for (int place = 0; place < tile.count; ++place) {
        float* weights = attending.scores.data() + size_t(place) * steps;
        if (normalized) softmax(weights, tile.length[place], tile.steps);
        float* result = pooled + size_t(tile.row[place]) * hidden;
        std::fill_n(result, hidden, 0.0f);
        for (int number = 0; number < tile.length[place]; ++number) {
          const float weight = normalized ? weights[number] : weights[number] + score_bias;
          const float* state = states + (size_t(number) * users + tile.user[place]) * hidden;
          for (int k = 0; k < hidden; ++k) result[k] += weight * state[k];
        }
      }
    }
  });
  return kDone;
}

}  // extern "C"
