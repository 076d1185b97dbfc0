// Threads that share out the tiles of one kernel.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "vectors.h"

namespace liber {

// A pool that sleeps between calls: a spinning one would take the cores from the other processes of a server.
class Pool {
 public:
  void run(int tasks, int threads, const std::function<void(int)>& work) {
    threads = std::min(threads, tasks);
    if (threads <= 1) {
      for (int task = 0; task < tasks; ++task) work(task);
      return;
    }
    std::lock_guard<std::mutex> one_caller(callers_);
    while (static_cast<int>(members_.size()) < threads - 1) {
      members_.emplace_back([this, member = static_cast<int>(members_.size()), seen = round_] { serve(member, seen); });
    }
    {
      std::lock_guard<std::mutex> guard(mutex_);
      work_ = &work;
      tasks_ = tasks;
      next_.store(0);
      invited_ = busy_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    take(work, tasks);
    std::unique_lock<std::mutex> guard(mutex_);
    done_.wait(guard, [this] { return busy_ == 0; });
  }

 private:
  void take(const std::function<void(int)>& work, int tasks) {
    for (int task; (task = next_.fetch_add(1)) < tasks;) work(task);
  }

  void serve(int member, uint64_t seen) {
    for (;;) {
      const std::function<void(int)>* work;
      int tasks;
      {
        std::unique_lock<std::mutex> guard(mutex_);
        wake_.wait(guard, [&] { return round_ != seen && member < invited_; });
        seen = round_;
        work = work_;
        tasks = tasks_;
      }
      take(*work, tasks);
      std::lock_guard<std::mutex> guard(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> members_;
  std::atomic<int> next_{0};
  const std::function<void(int)>* work_ = nullptr;
  int tasks_ = 0, invited_ = 0, busy_ = 0;
  uint64_t round_ = 0;
};

inline Pool& pool() {
  static Pool* const the_pool = new Pool;  // never destroyed: its threads outlive whatever ends the process
  return *the_pool;
}

// How many tasks `rows` make: some for each thread, so that none waits long for the last, in whole tiles.
struct Share {
  int tasks, size;
  Share(int rows, int threads) {
    const int wanted = threads <= 1 ? 1 : 4 * threads;
    size = (std::max(1, (rows + wanted - 1) / wanted) + kRows - 1) / kRows * kRows;
    tasks = (rows + size - 1) / size;
  }
};

}  // namespace liber
