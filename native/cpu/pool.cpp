#include "cpu/pool.h"

#include <chrono>
#include <stdexcept>
#include <string>

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

constexpr uint64_t kInside = 1;         // bits 0..14: members inside the task
constexpr uint64_t kEntered = 1 << 15;  // bits 15..30: members that have entered it
constexpr uint64_t kClosed = 1U << 31;  // no member may enter any more
constexpr uint64_t kTask = uint64_t{1} << 32;

constexpr int kMaxThreads = 1024;  // within the 15 bits of members inside

uint64_t task_of(uint64_t state) { return state / kTask; }
uint64_t inside(uint64_t state) { return state % kEntered; }
uint64_t entered(uint64_t state) { return state % kClosed / kEntered; }

}  // namespace

Pool::Pool() : state_(kClosed) {}

void Pool::resize(int threads) {
    if (threads < 1 || threads > kMaxThreads)
        throw std::invalid_argument("threads must be between 1 and " + std::to_string(kMaxThreads) + ", got " +
                                    std::to_string(threads));
    std::lock_guard caller(callers_);
    if (threads == size()) return;
    {
        std::lock_guard lock(mutex_);
        stop_.store(true);
        state_.fetch_add(kTask);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    size_.store(1);
    for (int member = 1; member < threads; ++member) {
        workers_.emplace_back([this, member] { work(member); });
        size_.store(member + 1);  // true also if the next one cannot be started
    }
}

void Pool::run_raw(Raw body, void* context, bool wait_for_all) {
    std::lock_guard caller(callers_);
    if (workers_.empty()) {
        body(context, 0, 1);
        return;
    }
    body_ = body;
    context_ = context;
    // Sequentially consistent with sleeping_: no wake-up is lost.
    state_.store((task_of(state_.load()) + 1) * kTask);
    if (sleeping_.load() > 0) {
        {
            std::lock_guard lock(mutex_);
        }
        wake_.notify_all();
    }
    body(context, 0, size());
    auto wait = [this](auto&& done) {
        while (!spin_until([&] { return done(state_.load(std::memory_order_acquire)); })) std::this_thread::yield();
    };
    if (wait_for_all) wait([this](uint64_t state) { return entered(state) == workers_.size(); });
    state_.fetch_or(kClosed, std::memory_order_acq_rel);
    wait([](uint64_t state) { return inside(state) == 0; });
}

void Pool::work(int member) {
    uint64_t seen = 0;
    for (;;) {
        auto changed = [&] { return task_of(state_.load(std::memory_order_acquire)) != seen; };
        if (!spin_until(changed)) {
            std::unique_lock lock(mutex_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, [&] { return task_of(state_.load()) != seen; });
            sleeping_.fetch_sub(1);
        }
        uint64_t state = state_.load(std::memory_order_acquire);
        for (;;) {
            seen = task_of(state);
            if (stop_.load()) return;
            if ((state & kClosed) != 0) break;
            if (!state_.compare_exchange_weak(state, state + kEntered + kInside, std::memory_order_acq_rel)) continue;
            body_(context_, member, size());
            state_.fetch_sub(kInside, std::memory_order_release);
            break;
        }
    }
}

Pool& pool() {
    static Pool& instance = *new Pool;
    return instance;
}

}  // namespace moestream
