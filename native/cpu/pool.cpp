#include "cpu/pool.h"

#include <algorithm>
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

// Items [begin, end) in one word.
uint64_t range(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end); }
int64_t begin_of(uint64_t range) { return static_cast<int64_t>(range >> 32); }
int64_t end_of(uint64_t range) { return static_cast<int64_t>(range & 0xffffffffU); }
int64_t length_of(uint64_t range) { return end_of(range) - begin_of(range); }

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
    ranges_ = std::vector<Range>(static_cast<size_t>(threads));
    stop_.store(false);
    size_.store(1);
    for (int member = 1; member < threads; ++member) {
        workers_.emplace_back([this, member] { work(member); });
        size_.store(member + 1);  // true also if the next one cannot be started
    }
}

void Pool::run_pieces(Piece body, void* context, int64_t count, int64_t grain) {
    std::lock_guard caller(callers_);
    const int64_t members = size();
    for (int64_t member = 0; member < members; ++member)
        ranges_[member].left.store(range(count * member / members, count * (member + 1) / members),
                                   std::memory_order_relaxed);
    auto loop = [&](int member, int) {
        std::atomic<uint64_t>& own = ranges_[member].left;
        do {
            uint64_t left = own.load(std::memory_order_relaxed);
            while (begin_of(left) < end_of(left)) {
                const int64_t begin = begin_of(left);
                const int64_t end = std::min(begin + std::max(grain, length_of(left) / 4), end_of(left));
                if (!own.compare_exchange_weak(left, range(end, end_of(left)), std::memory_order_relaxed)) continue;
                body(context, begin, end);
                left = own.load(std::memory_order_relaxed);
            }
        } while (steal(member));
    };
    run_on_members(call<decltype(loop)>, &loop, false);
}

// Fills the member's range with half of the longest one; false when there is nothing left.
bool Pool::steal(int member) {
    for (;;) {
        std::atomic<uint64_t>* victim = nullptr;
        uint64_t most = 0;
        for (Range& other : ranges_) {
            const uint64_t left = other.left.load(std::memory_order_relaxed);
            if (length_of(left) > length_of(most)) {
                victim = &other.left;
                most = left;
            }
        }
        if (victim == nullptr) return false;
        const int64_t middle = begin_of(most) + length_of(most) / 2;
        if (victim->compare_exchange_strong(most, range(begin_of(most), middle), std::memory_order_relaxed)) {
            ranges_[member].left.store(range(middle, end_of(most)), std::memory_order_relaxed);
            return true;
        }
    }
}

void Pool::run_raw(Raw body, void* context, bool wait_for_all) {
    std::lock_guard caller(callers_);
    run_on_members(body, context, wait_for_all);
}

void Pool::run_on_members(Raw body, void* context, bool wait_for_all) {
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
