// The threads of a block, and the barriers at which they wait for each other.
//
// For a sanitizer each is a real one. Otherwise they take turns on one thread of the host, each
// until it waits, which is many times faster than threads that put each other to sleep. From turn
// to turn the order is from the first to the last or the other way, by chance that is always the
// same: without a barrier that is needed, what it is for is not there yet in one of the two.

#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <pthread.h>

#include <thread>
#else
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#endif
#include <vector>

namespace host_execution {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

// Two in turn. A thread that leaves a barrier late would otherwise meet there what others did
// since, on their way to the next one, and ThreadSanitizer would take that for order.
class Barrier {
 public:
  explicit Barrier(int threads) : turns_(kMaxThreads) {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, threads);
  }
  ~Barrier() {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_destroy(&barrier);
  }
  Barrier(const Barrier&) = delete;
  // It puts the thread to sleep: 256 share few cores.
  void wait() { pthread_barrier_wait(&barriers_[turns_[threadIdx.x]++ % 2]); }

 private:
  pthread_barrier_t barriers_[2];
  std::vector<int> turns_;  // the waits of each thread
};

// Returns when work(0), ..., work(threads - 1) have.
template <typename Work>
void run_threads(int threads, const Work& work) {
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) team.emplace_back(work, thread);
  work(0);
  for (std::thread& thread : team) thread.join();
}

#else

constexpr size_t kStackBytes = 256 << 10;  // memory that is not touched takes none
constexpr size_t kGuardBytes = 64 << 10;   // below it, at least a page: beyond it, it faults

class Barrier;

struct Turn {
  std::function<void()> work;
  jmp_buf at;  // where it goes on
  const Barrier* waits = nullptr;
  int64_t until = 0;  // so many meetings
  bool begun = false, over = false;
};

inline thread_local jmp_buf giver;  // who gives the turns
inline thread_local Turn* taken;    // by the thread that runs

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  Barrier(const Barrier&) = delete;

  // The last one goes on at once.
  void wait() {
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++meetings_;
      return;
    }
    Turn& mine = *taken;
    mine.waits = this;
    mine.until = meetings_ + 1;
    if (!_setjmp(mine.at)) _longjmp(giver, 1);
  }
  int64_t meetings() const { return meetings_; }

 private:
  const int threads_;
  int arrived_ = 0;
  int64_t meetings_ = 0;
};

// Kept for the next kernel; each with a guard.
inline char* stack(size_t thread) {
  static thread_local std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* const made = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED || mprotect(made, kGuardBytes, PROT_NONE)) {
      std::perror("a stack for a thread of a block");
      std::abort();
    }
    stacks.push_back(static_cast<char*>(made) + kGuardBytes);
  }
  return stacks[thread];
}

// On its own stack. It does not return: there is nothing below it.
inline void begin() {
  taken->work();
  taken->over = true;
  _longjmp(giver, 1);
}

// Until it waits, or is over.
inline void give_turn(Turn& turn, size_t thread) {
  taken = &turn;
  if (_setjmp(giver)) return;
  if (turn.begun) _longjmp(turn.at, 1);
  turn.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(thread);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, begin, 0);
  setcontext(&context);
}

// Returns when work(0), ..., work(threads - 1) have.
template <typename Work>
void run_threads(int threads, const Work& work) {
  std::vector<Turn> turns(threads);
  for (int thread = 0; thread < threads; ++thread) {
    turns[thread].work = [&work, thread] { work(thread); };
  }
  uint64_t chance = 1;
  for (int left = threads; left > 0;) {
    chance = chance * 6364136223846793005u + 1442695040888963407u;
    const bool first_to_last = chance >> 63;
    bool moved = false;
    for (int k = 0; k < threads; ++k) {
      const int thread = first_to_last ? k : threads - 1 - k;
      Turn& turn = turns[thread];
      if (turn.over || (turn.waits && turn.waits->meetings() < turn.until)) continue;
      moved = true;
      give_turn(turn, thread);
      left -= turn.over;
    }
    if (!moved) {
      std::fprintf(stderr, "threads of a block wait at a barrier that others never reach\n");
      std::abort();
    }
  }
}

#endif

}  // namespace host_execution
