// Reads batches of byte ranges with a pool of threads. What to read, and where to, is decided in Python.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "io/file.h"

namespace moestream {

// One row of a batch. Rows with the same ticket belong together: the ticket is done when all of them are.
struct Range {
    int64_t file;
    int64_t offset;
    int64_t nbytes;
    int64_t dest;  // address; congruent to offset modulo kBlock for files opened direct
    int64_t ticket;
};

struct Failure {
    int64_t ticket;
    int error;  // errno; 0: the file ended; ECANCELED: cancel or cancel_prefetch
    int64_t file;
    int64_t offset;  // where the read stopped
};

struct Completions {
    std::vector<int64_t> done;
    std::vector<Failure> failed;
};

struct ReaderCounters {
    int64_t bytes_asked = 0;   // of ranges submitted
    int64_t bytes_disk = 0;    // moved by reads that may touch the disk, whole blocks for direct files
    int64_t bytes_cached = 0;  // served by the page cache at once (buffered files on Linux)
    int64_t reads = 0;
    int64_t errors = 0;       // tickets that failed
    double busy_seconds = 0;  // time with at least one read in flight
};

// Thread rule: all methods may be called from any thread; completions go to whoever waits first, so one
// consumer at a time. Memory of a submitted range must stay valid until its ticket is reported.
class Reader {
public:
    explicit Reader(int threads);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Returns the file's id. Throws std::system_error.
    int64_t open(const std::string& path, bool direct);
    int64_t size(int64_t file);
    bool is_direct(int64_t file);

    // Memory that ranges may be read into. detach throws std::invalid_argument while reads are outstanding.
    void attach(int64_t address, int64_t nbytes);
    void detach(int64_t address);

    // Queues all rows, or throws std::invalid_argument naming the bad row and queues none. Demand reads are
    // always taken before prefetch reads; each queue is first in, first out.
    void submit(const Range* ranges, int64_t count, bool prefetch);
    // From now on no more than so many prefetch reads run at a time; a demand read waits for no more than them.
    void limit_prefetch(int reads);
    // Returns tickets finished since the last call: waits for at least `min_count` of them, or for all
    // outstanding ones if they are fewer, but no longer than `timeout` seconds.
    Completions wait(int64_t min_count, double timeout);
    // Puts what is queued of these prefetch tickets before all demand reads: now somebody waits for them. Reads
    // under way just finish; tickets that are reported, unknown or demand already are left alone.
    void promote(std::vector<int64_t> tickets);
    // Drops what is queued of these prefetch tickets; a ticket that loses a read fails with ECANCELED once nothing
    // of it is being read. One whose reads are all under way or done succeeds as if nothing had happened.
    void cancel(std::vector<int64_t> tickets);
    // The same for all prefetch tickets.
    void cancel_prefetch();

    int64_t outstanding();
    ReaderCounters counters();
    // Drops queued reads, waits for running ones and joins the threads. Later submits throw.
    void close();

private:
    struct Ticket {
        int64_t remaining = 0;
        bool failed = false;
        Failure failure{};
    };
    using Tickets = std::unordered_map<int64_t, Ticket>;
    struct Job {
        File* file;
        int64_t file_id;
        int64_t offset;
        int64_t nbytes;
        char* dest;
        Tickets::value_type* ticket;
    };
    struct Region {
        int64_t begin;
        int64_t end;
    };
    using Clock = std::chrono::steady_clock;

    File& file_at(int64_t file);
    void check(const Range& range, int64_t row);
    void enqueue(const Range& range, std::deque<Job>& queue);
    std::deque<Job> take_prefetch(std::vector<int64_t> tickets);
    void drop(const std::deque<Job>& jobs);
    void wake(size_t pieces);
    void work();
    ReadStatus perform(const Job& job);
    void finish(const Job& job, const ReadStatus& status);
    void count_error();
    void disk_begin();
    void disk_end(int64_t nbytes);

    std::mutex mutex_;  // all below, except what disk_mutex_ guards
    std::condition_variable work_ready_;
    std::condition_variable tickets_ready_;
    std::vector<std::unique_ptr<File>> files_;
    std::vector<Region> regions_;
    std::deque<Job> demand_;
    std::deque<Job> prefetch_;
    int prefetching_ = 0;  // threads with a read of that queue
    int most_prefetching_ = std::numeric_limits<int>::max();
    Tickets tickets_;
    Completions completions_;
    int64_t awaited_ = 0;  // what wait() still wants; it is woken once, not per ticket
    bool closed_ = false;
    std::vector<std::thread> threads_;

    std::mutex disk_mutex_;
    int64_t in_flight_ = 0;
    Clock::time_point busy_since_{};
    ReaderCounters counters_;
};

// Reads random aligned blocks for about `seconds` and returns bytes per second. Throws std::system_error, or
// std::invalid_argument if the file is smaller than a block.
double probe_read(const std::string& path, int64_t block, double seconds, bool direct, int threads);

}  // namespace moestream
