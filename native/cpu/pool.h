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

    // Calls body(begin, end) over [0, count) in pieces of at least `grain`. Every member walks a range of its own from
    // front to back, so that what it reads next lies where its prefetches have already asked; a member without work
    // takes the back half of someone else's. Pieces start large and shrink: taking one waits for the core's reads.
    // A member that comes after the work is handed out is not waited for: on a busy machine its core may be someone
    // else's for milliseconds.
    template <class Body>
    void parallel_for(int64_t count, int64_t grain, Body&& body) {
        if (count <= 0) return;
        if (grain < 1) grain = 1;
        if (size() == 1 || count <= grain) {
            body(int64_t{0}, count);
            return;
        }
        run_pieces(call_piece<std::remove_reference_t<Body>>, &body, count, grain);
    }

private:
    using Raw = void (*)(void*, int, int);
    using Piece = void (*)(void*, int64_t, int64_t);
    // What is left of a member's range, begin and end in one word: the owner takes from the front, thieves the back.
    struct alignas(64) Range {
        std::atomic<uint64_t> left{0};
    };

    template <class Body>
    static void call(void* context, int member, int size) {
        (*static_cast<Body*>(context))(member, size);
    }
    template <class Body>
    static void call_piece(void* context, int64_t begin, int64_t end) {
        (*static_cast<Body*>(context))(begin, end);
    }
    void run_raw(Raw body, void* context, bool wait_for_all);
    void run_on_members(Raw body, void* context, bool wait_for_all);  // under callers_
    void run_pieces(Piece body, void* context, int64_t count, int64_t grain);
    bool steal(int member);
    void work(int member);

    std::mutex callers_;
    std::vector<std::thread> workers_;  // changed only under callers_
    std::vector<Range> ranges_;         // one for each member; the same
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
