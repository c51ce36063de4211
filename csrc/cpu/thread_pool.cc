#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "float_environment.h"

#if defined(URM_X86)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace urm {
namespace {

// About 50 us: back-to-back calls find the helpers awake, and a caller that is done a little before its helpers does
// not go to sleep, which costs as much again.
constexpr int kSpins = 1000;

void relax() {
#if defined(URM_X86)
  _mm_pause();
#endif
}

// Where a caller runs. Linux likes to wake a thread on the processor of the one that wakes it, in whose place it then
// runs: of two threads one would wait for the other.
struct Place {
#if defined(__linux__)
  int processor = sched_getcpu();
  pid_t thread = static_cast<pid_t>(syscall(SYS_gettid));

  // Moves this thread to where the caller may run, too, but does not; it stays excluded from there until it meets a
  // caller elsewhere, so that the next waking need not migrate again.
  void leave() const {
    if (processor < 0 || sched_getcpu() != processor) return;
    cpu_set_t others;
    if (sched_getaffinity(thread, sizeof(others), &others) != 0) return;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others)) sched_setaffinity(0, sizeof(others), &others);
  }
#else
  void leave() const {}
#endif
};

struct Region {
  const std::function<void(int)>* body;
  int next_slot;  // guarded by the pool's mutex, as every change here
  int slots;
  Place caller;
  std::atomic<int> running{0};
};

class Pool {
 public:
  void run(int threads, const std::function<void(int)>& body) {
    Region region{&body, 1, threads, Place(), {0}};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      regions_.push_back(&region);
      open_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(0);
    std::unique_lock<std::mutex> lock(mutex_);
    close(&region);
    lock.unlock();
    for (int spin = 0; spin < kSpins && region.running.load(std::memory_order_acquire); ++spin) relax();
    lock.lock();
    done_.wait(lock, [&] { return region.running == 0; });
  }

 private:
  void grow(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those that exist, and the caller, do the work.
    }
  }

  void close(Region* region) {
    const auto at = std::find(regions_.begin(), regions_.end(), region);
    if (at == regions_.end()) return;
    regions_.erase(at);
    open_.fetch_sub(1, std::memory_order_release);
  }

  void help() {
    const DefaultFloatEnvironment environment;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (regions_.empty()) {
        lock.unlock();
        for (int spin = 0; spin < kSpins && open_.load(std::memory_order_acquire) == 0; ++spin) relax();
        lock.lock();
        wake_.wait(lock, [&] { return !regions_.empty(); });
      }
      Region* region = regions_.front();
      const int slot = region->next_slot++;
      if (region->next_slot >= region->slots) close(region);
      ++region->running;
      const Place caller = region->caller;
      lock.unlock();
      caller.leave();
      (*region->body)(slot);
      lock.lock();
      if (--region->running == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Region*> regions_;
  std::atomic<int> open_{0};
  int helpers_ = 0;
};

// Never destroyed: helpers are detached and may outlive static destructors. A forked child has none of the parent's
// helpers and possibly a locked mutex, so it abandons the pool and makes a new one.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* existing = current.load(std::memory_order_acquire);
  if (existing) return *existing;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)registered;
  Pool* fresh = new Pool;
  if (!current.compare_exchange_strong(existing, fresh)) {
    delete fresh;
    return *existing;
  }
  return *fresh;
}

}  // namespace

void run_parallel(int threads, const std::function<void(int)>& body) {
  if (threads <= 1) body(0);
  else pool().run(threads, body);
}

}  // namespace urm
