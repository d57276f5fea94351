#include "io/reader.h"

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace moestream {
namespace {

// Larger ranges are spread over threads so that one expert lands sooner; smaller pieces cost more calls.
constexpr int64_t kPiece = int64_t{2} << 20;

}  // namespace

Reader::Reader(int threads) {
    if (threads < 1) throw std::invalid_argument("reader threads must be at least 1");
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

Reader::~Reader() { close(); }

int64_t Reader::open(const std::string& path, bool direct) {
    auto file = std::make_unique<File>(path, direct);
    std::lock_guard lock(mutex_);
    files_.push_back(std::move(file));
    return static_cast<int64_t>(files_.size()) - 1;
}

File& Reader::file_at(int64_t file) {
    if (file < 0 || file >= static_cast<int64_t>(files_.size()))
        throw std::invalid_argument("no open file has id " + std::to_string(file));
    return *files_[static_cast<size_t>(file)];
}

int64_t Reader::size(int64_t file) {
    std::lock_guard lock(mutex_);
    return file_at(file).size();
}

bool Reader::is_direct(int64_t file) {
    std::lock_guard lock(mutex_);
    return file_at(file).direct();
}

void Reader::attach(int64_t address, int64_t nbytes) {
    std::lock_guard lock(mutex_);
    regions_.push_back({address, address + nbytes});
}

void Reader::detach(int64_t address) {
    std::lock_guard lock(mutex_);
    if (!tickets_.empty()) throw std::invalid_argument("memory cannot be detached while reads are outstanding");
    std::erase_if(regions_, [address](const Region& region) { return region.begin == address; });
}

void Reader::check(const Range& range, int64_t row) {
    const auto refuse = [row](const char* why) {
        throw std::invalid_argument("row " + std::to_string(row) + ": " + why);
    };
    const int64_t limit = INT64_MAX - kBlock - range.nbytes;
    if (range.nbytes < 1 || range.offset < 0 || range.offset > limit || range.dest < 0 || range.dest > limit)
        refuse("offset, nbytes and destination are not a range");
    int64_t begin = range.dest;
    int64_t end = range.dest + range.nbytes;
    if (file_at(range.file).skewed()) {
        if ((range.dest - range.offset) % kBlock != 0) refuse("destination and offset differ modulo 4096");
        begin = round_down(begin);
        end = round_up(end);
    }
    for (const Region& region : regions_)
        if (begin >= region.begin && end <= region.end) return;
    refuse("destination is outside the attached memory");
}

void Reader::enqueue(const Range& range, std::deque<Job>& queue) {
    auto& ticket = *tickets_.find(range.ticket);
    File* file = files_[static_cast<size_t>(range.file)].get();
    const int64_t end = range.offset + range.nbytes;
    const int64_t pieces = (range.nbytes + kPiece / 2) / kPiece;
    const int64_t step = pieces > 1 ? round_up(range.nbytes / pieces) : range.nbytes + kBlock;
    for (int64_t at = range.offset; at < end;) {
        int64_t next = round_down(at) + step;  // pieces meet at block borders: none is read twice
        if (next > end) next = end;
        queue.push_back(
            {file, range.file, at, next - at, reinterpret_cast<char*>(range.dest + (at - range.offset)), &ticket});
        ++ticket.second.remaining;
        at = next;
    }
}

void Reader::submit(const Range* ranges, int64_t count, bool prefetch) {
    int64_t asked = 0;
    size_t pieces = 0;
    {
        std::lock_guard lock(mutex_);
        if (closed_) throw std::invalid_argument("the reader is closed");
        for (int64_t i = 0; i < count; ++i) {
            check(ranges[i], i);
            if (tickets_.contains(ranges[i].ticket))
                throw std::invalid_argument("ticket " + std::to_string(ranges[i].ticket) + " is already outstanding");
        }
        std::deque<Job>& queue = prefetch ? prefetch_ : demand_;
        const size_t queued = queue.size();
        for (int64_t i = 0; i < count; ++i) {
            tickets_.try_emplace(ranges[i].ticket);
            enqueue(ranges[i], queue);
            asked += ranges[i].nbytes;
        }
        pieces = queue.size() - queued;
        if (prefetch) pieces = std::min(pieces, static_cast<size_t>(most_prefetching_));
    }
    {
        std::lock_guard lock(disk_mutex_);
        counters_.bytes_asked += asked;
    }
    wake(pieces);
}

void Reader::wake(size_t pieces) {
    for (size_t i = 0; i < std::min(pieces, threads_.size()); ++i) work_ready_.notify_one();
}

void Reader::limit_prefetch(int reads) {
    if (reads < 1) throw std::invalid_argument("at least one prefetch read must be allowed");
    {
        std::lock_guard lock(mutex_);
        if (reads == most_prefetching_) return;
        most_prefetching_ = reads;
    }
    work_ready_.notify_all();
}

Completions Reader::wait(int64_t min_count, double timeout) {
    std::unique_lock lock(mutex_);
    const auto ready = [this] { return static_cast<int64_t>(completions_.done.size() + completions_.failed.size()); };
    const int64_t possible = ready() + static_cast<int64_t>(tickets_.size());
    awaited_ = min_count < possible ? min_count : possible;
    const auto enough = [&] { return ready() >= awaited_ || closed_; };
    if (!enough()) {
        const auto limit = std::chrono::duration<double>(timeout < 1e6 ? timeout : 1e6);
        tickets_ready_.wait_for(lock, limit, enough);
    }
    Completions result;
    std::swap(result, completions_);
    return result;
}

// Removes the queued prefetch reads of some tickets, in order. The caller holds mutex_.
std::deque<Reader::Job> Reader::take_prefetch(std::vector<int64_t> tickets) {
    std::sort(tickets.begin(), tickets.end());
    const auto chosen = [&tickets](const Job& job) {
        return std::binary_search(tickets.begin(), tickets.end(), job.ticket->first);
    };
    std::deque<Job> taken;
    std::copy_if(prefetch_.begin(), prefetch_.end(), std::back_inserter(taken), chosen);
    std::erase_if(prefetch_, chosen);
    return taken;
}

void Reader::promote(std::vector<int64_t> tickets) {
    size_t pieces = 0;
    {
        std::lock_guard lock(mutex_);
        const std::deque<Job> jobs = take_prefetch(std::move(tickets));
        demand_.insert(demand_.begin(), jobs.begin(), jobs.end());
        pieces = jobs.size();
    }
    wake(pieces);  // the limit of prefetch reads may have kept threads from them
}

void Reader::cancel(std::vector<int64_t> tickets) {
    std::deque<Job> dropped;
    {
        std::lock_guard lock(mutex_);
        dropped = take_prefetch(std::move(tickets));
    }
    drop(dropped);
}

void Reader::cancel_prefetch() {
    std::deque<Job> dropped;
    {
        std::lock_guard lock(mutex_);
        std::swap(dropped, prefetch_);
    }
    drop(dropped);
}

void Reader::drop(const std::deque<Job>& jobs) {
    for (const Job& job : jobs) finish(job, {false, ECANCELED, job.offset});
}

int64_t Reader::outstanding() {
    std::lock_guard lock(mutex_);
    return static_cast<int64_t>(tickets_.size());
}

ReaderCounters Reader::counters() {
    std::lock_guard lock(disk_mutex_);
    ReaderCounters result = counters_;
    if (in_flight_ > 0) result.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
    return result;
}

void Reader::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
        demand_.clear();
        prefetch_.clear();
    }
    work_ready_.notify_all();
    tickets_ready_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    std::lock_guard lock(mutex_);
    tickets_.clear();
}

void Reader::work() {
    for (;;) {
        Job job;
        bool ahead = false;
        {
            std::unique_lock lock(mutex_);
            work_ready_.wait(lock, [this] {
                return closed_ || !demand_.empty() || (!prefetch_.empty() && prefetching_ < most_prefetching_);
            });
            if (closed_) return;
            ahead = demand_.empty();
            std::deque<Job>& queue = ahead ? prefetch_ : demand_;
            job = queue.front();
            queue.pop_front();
            prefetching_ += ahead ? 1 : 0;
        }
        finish(job, perform(job));
        if (ahead) {
            {
                std::lock_guard lock(mutex_);
                --prefetching_;
            }
            work_ready_.notify_one();  // this thread may take a demand read
        }
    }
}

ReadStatus Reader::perform(const Job& job) {
    const int64_t cached = job.file->read_cached(job.offset, job.nbytes, job.dest);
    if (cached > 0) {
        std::lock_guard lock(disk_mutex_);
        counters_.bytes_cached += cached;
        if (cached == job.nbytes) {
            ++counters_.reads;
            return {};
        }
    }
    const int64_t offset = job.offset + cached;
    const int64_t rest = job.nbytes - cached;
    disk_begin();
    const ReadStatus status = job.file->read(offset, rest, job.dest + cached);
    const bool direct = job.file->direct();
    disk_end(!status.ok ? 0 : direct ? round_up(offset + rest) - round_down(offset) : rest);
    return status;
}

void Reader::finish(const Job& job, const ReadStatus& status) {
    bool wake = false;
    {
        std::lock_guard lock(mutex_);
        Ticket& ticket = job.ticket->second;
        const int64_t id = job.ticket->first;
        if (!status.ok && !ticket.failed) {
            ticket.failed = true;
            ticket.failure = {id, status.error, job.file_id, status.offset};
        }
        // Reported only when nothing of it is being read any more: its memory may be used again at once.
        if (--ticket.remaining == 0) {
            if (ticket.failed) {
                if (ticket.failure.error != ECANCELED) count_error();  // before the report: whoever sees it sees both
                completions_.failed.push_back(ticket.failure);
            } else {
                completions_.done.push_back(id);
            }
            tickets_.erase(id);
            wake = static_cast<int64_t>(completions_.done.size() + completions_.failed.size()) >= awaited_;
        }
    }
    if (wake) tickets_ready_.notify_all();
}

void Reader::count_error() {
    std::lock_guard lock(disk_mutex_);
    ++counters_.errors;
}

void Reader::disk_begin() {
    std::lock_guard lock(disk_mutex_);
    if (in_flight_++ == 0) busy_since_ = Clock::now();
}

void Reader::disk_end(int64_t nbytes) {
    std::lock_guard lock(disk_mutex_);
    ++counters_.reads;
    counters_.bytes_disk += nbytes;
    if (--in_flight_ == 0) counters_.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since_).count();
}

}  // namespace moestream
