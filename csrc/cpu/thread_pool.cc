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

struct Region {
  const std::function<void(int)>* body;
  int next_slot;  // guarded by the pool's mutex, as every change here
  int slots;
  std::atomic<int> running{0};
};

class Pool {
 public:
  void run(int threads, const std::function<void(int)>& body) {
    Region region{&body, 1, threads, {0}};
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
      lock.unlock();
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
