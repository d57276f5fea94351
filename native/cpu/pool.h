// The compute threads. One pool per process; the calling thread is member 0.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace moestream {

// Thread rule: any thread may call any member function (callers are serialised by a mutex); the body
// runs on every member at once and must not throw or call back into the pool.
class Pool {
public:
    Pool();
    ~Pool() = delete;  // lives as long as the process: other threads may be in it until the very end
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return size_.load(std::memory_order_relaxed); }

    // Waits for what is running. Throws std::invalid_argument unless 1 <= threads <= 1024.
    void resize(int threads);

    // Calls body(member, size()) on every member and returns when all are done.
    template <class Body>
    void run(Body&& body) {
        run_raw(call<std::remove_reference_t<Body>>, &body, true);
    }

    // Calls body(begin, end) over [0, count) in pieces of at least `grain`, handed out dynamically so that a member
    // slowed by a neighbour does less. Pieces start large and shrink: a member then walks adjacent items, whose bytes
    // its prefetches have already asked for. A member that comes after the work is handed out is not waited for: on a
    // busy machine its core may be someone else's for milliseconds.
    template <class Body>
    void parallel_for(int64_t count, int64_t grain, Body&& body) {
        if (count <= 0) return;
        if (grain < 1) grain = 1;
        if (size() == 1 || count <= grain) {
            body(int64_t{0}, count);
            return;
        }
        std::atomic<int64_t> next{0};
        auto loop = [&](int, int members) {
            for (;;) {
                int64_t begin = next.load(std::memory_order_relaxed);
                int64_t end;
                do {
                    if (begin >= count) return;
                    const int64_t share = (count - begin) / (2 * members);
                    end = begin + (share > grain ? share : grain);
                    if (end > count) end = count;
                } while (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
                body(begin, end);
            }
        };
        run_raw(call<decltype(loop)>, &loop, false);
    }

private:
    using Raw = void (*)(void*, int, int);
    template <class Body>
    static void call(void* context, int member, int size) {
        (*static_cast<Body*>(context))(member, size);
    }
    void run_raw(Raw body, void* context, bool wait_for_all);
    void work(int member);

    std::mutex callers_;
    std::vector<std::thread> workers_;  // changed only under callers_
    std::atomic<int> size_{1};
    std::mutex mutex_;
    std::condition_variable wake_;
    // One word, so that entering a task and closing it exclude each other: the task's number in the high half,
    // then whether it is closed, how many members have entered and how many of them are still inside.
    std::atomic<uint64_t> state_;
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    Raw body_ = nullptr;  // written only while no member is inside
    void* context_ = nullptr;
};

// The process's pool; it has 1 thread until it is resized.
Pool& pool();

}  // namespace moestream
