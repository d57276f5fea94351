// Changes the number of compute threads while another thread computes. Built with AddressSanitizer by test_pool.py.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "cpu/pool.h"

using namespace moestream;

int main() {
    constexpr int64_t kItems = 2000;
    pool().resize(2);
    std::atomic<bool> stop{false};
    int wrong = 0;
    std::thread caller([&] {
        while (!stop) {
            std::atomic<int64_t> sum{0};
            pool().parallel_for(kItems, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) sum += i;
            });
            wrong += sum != kItems * (kItems - 1) / 2;
            std::atomic<int> members{0};
            std::atomic<int> size{0};
            pool().run([&](int, int of) {
                ++members;
                size = of;
            });
            wrong += members != size;
            std::this_thread::yield();
        }
    });
    for (int i = 0; i < 60; ++i) {
        pool().resize(1 + i % 4);
        std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
    stop = true;
    caller.join();
    std::printf("%d wrong\n", wrong);
    return wrong != 0;
}
