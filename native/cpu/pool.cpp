#include "cpu/pool.h"

#include <chrono>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moestream {
namespace {

// Layers follow each other within tens of microseconds, so a short spin catches the next task; a longer one
// would steal time from a neighbour on a busy machine.
constexpr auto kSpin = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Done>
bool spin_until(Done&& done) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    for (;;) {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
        if (std::chrono::steady_clock::now() > deadline) return false;
    }
}

}  // namespace

Pool::Pool(int threads) {
    for (int member = 1; member < threads; ++member) workers_.emplace_back([this, member] { work(member); });
}

Pool::~Pool() {
    {
        std::lock_guard lock(mutex_);
        stop_.store(true);
        generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run_raw(Raw body, void* context) {
    std::lock_guard caller(callers_);
    if (workers_.empty()) {
        body(context, 0, 1);
        return;
    }
    body_ = body;
    context_ = context;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1);  // sequentially consistent with sleeping_: no wake-up is lost
    if (sleeping_.load() > 0) {
        {
            std::lock_guard lock(mutex_);
        }
        wake_.notify_all();
    }
    body(context, 0, size());
    auto finished = [this] { return running_.load(std::memory_order_acquire) == 0; };
    while (!spin_until(finished)) std::this_thread::yield();
}

void Pool::work(int member) {
    uint64_t seen = 0;
    for (;;) {
        auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
        if (!spin_until(changed)) {
            std::unique_lock lock(mutex_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, [&] { return generation_.load() != seen; });
            sleeping_.fetch_sub(1);
        }
        seen = generation_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        body_(context_, member, size());
        running_.fetch_sub(1, std::memory_order_release);
    }
}

namespace {
std::unique_ptr<Pool>& holder() {
    static std::unique_ptr<Pool> instance = std::make_unique<Pool>(1);
    return instance;
}
}  // namespace

Pool& pool() { return *holder(); }

void set_threads(int threads) {
    if (threads != pool().size()) holder() = std::make_unique<Pool>(threads);
}

}  // namespace moestream
