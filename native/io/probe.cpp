// What the disk gives: random aligned reads by plain threads, the ceiling that the reader is compared with.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <system_error>

#include "io/reader.h"

namespace moestream {
namespace {

struct FreeBuffer {
    void operator()(char* buffer) const { std::free(buffer); }
};
using Buffer = std::unique_ptr<char, FreeBuffer>;

// Like the arena: huge pages where there are any (a direct read into small ones is up to 1.8x slower), all of
// them touched, because page faults are not the disk's time.
Buffer make_buffer(int64_t nbytes) {
    constexpr int64_t kHuge = int64_t{2} << 20;
    const int64_t size = (nbytes + kHuge - 1) / kHuge * kHuge;
    Buffer buffer(static_cast<char*>(std::aligned_alloc(kHuge, static_cast<size_t>(size))));
    if (!buffer) throw std::bad_alloc();
#if defined(__linux__)
    ::madvise(buffer.get(), static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
    for (int64_t i = 0; i < nbytes; i += kBlock) buffer.get()[i] = 0;
    return buffer;
}

}  // namespace

double probe_read(const std::string& path, int64_t block, double seconds, bool direct, int threads) {
    if (block < kBlock || block % kBlock != 0)
        throw std::invalid_argument("block must be a multiple of 4096, got " + std::to_string(block));
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
    File file(path, direct);
    const int64_t places = (file.size() - block) / kBlock + 1;
    if (file.size() < block) throw std::invalid_argument(path + " is smaller than one block to read");

    std::vector<Buffer> buffers;
    for (int i = 0; i < threads; ++i) buffers.push_back(make_buffer(block));
    std::atomic<int64_t> total{0};
    std::atomic<int> error{0};
    const auto start = std::chrono::steady_clock::now();
    const auto elapsed = [start] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    const auto body = [&](int index) {
        std::mt19937_64 random(std::random_device{}() + static_cast<unsigned>(index));
        std::uniform_int_distribution<int64_t> place(0, places - 1);
        while (elapsed() < seconds && error.load() == 0) {
            const ReadStatus status =
                file.read(place(random) * kBlock, block, buffers[static_cast<size_t>(index)].get());
            if (!status.ok) error.store(status.error != 0 ? status.error : EIO);
            total.fetch_add(block);
        }
    };
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i) workers.emplace_back(body, i);
    for (auto& worker : workers) worker.join();
    if (error.load() != 0) throw std::system_error(error.load(), std::generic_category(), path);
    return static_cast<double>(total.load()) / elapsed();
}

}  // namespace moestream
