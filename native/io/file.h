// One open file. Everything the operating systems disagree about is in file.cpp.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

namespace moestream {

// Direct reads move whole blocks: extents are rounded out to this, so byte x of a file lands at an address
// congruent to x (the skewed address) and nothing is ever copied.
constexpr int64_t kBlock = 4096;

constexpr int64_t round_down(int64_t value) { return value & ~(kBlock - 1); }
constexpr int64_t round_up(int64_t value) { return round_down(value + kBlock - 1); }

// What a read came to: all bytes arrived (ok), the system refused (error = errno) or the file ended (error = 0).
struct ReadStatus {
    bool ok = true;
    int error = 0;
    int64_t offset = 0;  // where it stopped
};

// Thread rule: every method but the constructor and destructor may be called by any number of threads at once.
class File {
public:
    // Throws std::system_error if the file cannot be opened. Where direct reads are refused the file is read
    // through the page cache, and direct() says so.
    File(const std::string& path, bool direct);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    bool direct() const { return direct_.load(std::memory_order_relaxed); }
    // Asked to be direct: destinations must be skewed, whatever the file system then does.
    bool skewed() const { return skewed_; }
    int64_t size() const;

    // Copies what the page cache holds of the beginning of the range without touching the disk; 0 where that
    // cannot be known (direct files, other systems).
    int64_t read_cached(int64_t offset, int64_t nbytes, char* dest) const;
    // Reads the whole range. A direct file also overwrites the rest of the first and last block around dest.
    ReadStatus read(int64_t offset, int64_t nbytes, char* dest);

private:
    ReadStatus read_direct(int64_t offset, int64_t nbytes, char* dest);
    ReadStatus read_buffered(int64_t offset, int64_t nbytes, char* dest) const;

    int buffered_fd_ = -1;
    int direct_fd_ = -1;
    bool skewed_ = false;
    std::atomic<bool> direct_{false};
};

}  // namespace moestream
