// Ids and feedback to the indices of a vocabulary, without an object for each.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tiles.h"

namespace liber {
namespace {

inline uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93ull;
  return value ^ (value >> 32);
}

inline uint64_t hash_of(const char* text, size_t size) {
  uint64_t hash = size * 0x9e3779b97f4a7c15ull;
  for (; size >= 8; text += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, text, 8);
    hash = mix(hash ^ word);
  }
  uint64_t word = 0;
  std::memcpy(&word, text, size);
  return mix(hash ^ word);
}

// Ids and the numbers they have, from 1 in the order in which they came: a table with open addressing. Ids are compared
// as a whole, so that no two that hash alike are ever taken for each other.
struct Index {
  std::string text;
  std::vector<uint64_t> start;             // of every id in `text`, and one beyond the last
  std::vector<std::pair<uint32_t, int32_t>> slots;  // the upper half of the hash, the number; 0 where it is empty
  uint64_t mask;

  Index(const char* joined, size_t bytes, size_t count) : text(joined, bytes) {
    size_t room = 16;
    while (room < count + count / 2) room *= 2;
    slots.resize(room);
    mask = room - 1;
    start.reserve(count + 1);
    start.push_back(0);
    for (size_t number = 1; number <= count; ++number) {
      const size_t from = start.back(), line = text.find('\n', from), to = line == std::string::npos ? bytes : line;
      start.push_back(to + 1);
      put(from, to - from, int32_t(number));
    }
  }

  void put(size_t from, size_t size, int32_t number) {
    const uint64_t hash = hash_of(text.data() + from, size);
    uint64_t slot = hash & mask;
    // Of equal ids the last counts, as in a dictionary.
    while (slots[slot].second && !is(slots[slot], hash, text.data() + from, size)) slot = (slot + 1) & mask;
    slots[slot] = {uint32_t(hash >> 32), number};
  }

  int32_t find(const char* id, size_t size) const {
    const uint64_t hash = hash_of(id, size);
    for (uint64_t slot = hash & mask; slots[slot].second; slot = (slot + 1) & mask)
      if (is(slots[slot], hash, id, size)) return slots[slot].second;
    return 0;
  }

  bool is(const std::pair<uint32_t, int32_t>& slot, uint64_t hash, const char* id, size_t size) const {
    if (slot.first != uint32_t(hash >> 32)) return false;
    const uint64_t from = start[slot.second - 1];
    return start[slot.second] - 1 - from == size && std::memcmp(text.data() + from, id, size) == 0;
  }
};

}  // namespace
}  // namespace liber

using namespace liber;

extern "C" {

void* liber_index_new(const char* joined, int64_t bytes, int64_t count) { return new Index(joined, bytes, count); }
void liber_index_free(void* index) { delete static_cast<Index*>(index); }

int liber_index_find(const void* index, const char* joined, int64_t bytes, const int32_t* held, const int32_t* skipped,
                     int users, int steps, int threads, int32_t* numbers) {
  const char *at = joined, *const end = joined + bytes;
  const Index& ids = *static_cast<const Index*>(index);
  for (int user = 0; user < users; ++user) {
    if (held[user] - skipped[user] > steps) return kOutside;
    int32_t* to = numbers + size_t(user) * steps;
    for (int place = 0; place < held[user]; ++place) {
      if (at > end) return kOutside;
      const void* line = std::memchr(at, '\n', end - at);
      const char* stop = line ? static_cast<const char*>(line) : end;
      if (place >= skipped[user]) *to++ = ids.find(at, stop - at);
      at = stop + 1;
    }
  }
  return at == end + 1 || at == joined ? kDone : kOutside;
}

int liber_levels(const double* feedback, const int32_t* held, const int32_t* skipped, const double* boundaries,
                 int buckets, int users, int steps, int threads, int32_t* levels) {
  for (int user = 0; user < users; ++user) {
    if (held[user] - skipped[user] > steps) return kOutside;
    int32_t* to = levels + size_t(user) * steps;
    for (int place = skipped[user]; place < held[user]; ++place)
      *to++ = 1 + int32_t(std::upper_bound(boundaries, boundaries + buckets, feedback[place]) - boundaries);
    feedback += held[user];
  }
  return kDone;
}

}  // extern "C"
