// How the work of a call is shared out over torch's threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

namespace dropinf {

// A thread must have this much to do to be worth waking: 2-core AMD EPYC Zen 4, 2026-11.
constexpr double kThreadNs = 10e3;

// 1 where the caller is one of several already.
inline int64_t num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Items that are enough for a thread.
inline int64_t grain(double item_ns) {
  return std::max<int64_t>(1, static_cast<int64_t>(kThreadNs / std::max(item_ns, 1e-3)));
}

// item(k) for k in [first, num_items), each by whichever thread is free.
template <typename F>
void run_items(int64_t first, int64_t num_items, double ns, const F& item) {
  std::atomic<int64_t> next{first};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t k = next++; k < num_items; k = next++) item(k);
  };
  const int64_t workers =
      std::min({num_threads(), num_items - first, 1 + static_cast<int64_t>(ns / kThreadNs)});
  if (workers > 1) {
    at::parallel_for(0, workers, 1, work);
  } else {
    work(0, 1);
  }
}

// Threads that stay together over many short jobs of one caller. They take the parts of a job as
// they come free, so a thread that the system has put aside holds nobody up; a parallel_for for
// each job would wait for it every time.
class Team {
 public:
  // f(part, part + 1) for each part, on the caller and on the helpers that are there.
  void share(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
    job_ = &f;
    done_ = 0;
    ++generation_;
    left_.store(generation_ << 32 | static_cast<uint64_t>(count), std::memory_order_release);
    while (take()) {
    }
    for (int64_t tries = 0; done_.load(std::memory_order_acquire) < count;) wait(&tries);
  }
  void help() {
    for (int64_t tries = 0; !over_.load(std::memory_order_acquire);) {
      take() ? void(tries = 0) : wait(&tries);
    }
  }
  void end() { over_.store(true, std::memory_order_release); }

 private:
  struct Count {
    ~Count() { done.fetch_add(1, std::memory_order_release); }
    std::atomic<int64_t>& done;
  };

  // The part is counted even if f throws. Its job is the current one: until all parts are counted,
  // the caller does not go on.
  bool take() {
    uint64_t left = left_.load(std::memory_order_acquire);
    do {
      if ((left & kParts) == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel));
    const Count count{done_};
    const int64_t part = static_cast<int64_t>(left & kParts) - 1;
    (*job_)(part, part + 1);
    return true;
  }
  static void wait(int64_t* tries) {
    if (++*tries > 2000) std::this_thread::yield();
  }

  static constexpr uint64_t kParts = 0xffffffff;
  std::atomic<uint64_t> left_{0};  // the job's generation, and its parts that nobody took yet
  std::atomic<int64_t> done_{0};
  std::atomic<bool> over_{false};
  uint64_t generation_ = 0;
  const std::function<void(int64_t, int64_t)>* job_ = nullptr;
};

}  // namespace dropinf
