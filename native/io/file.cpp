#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace moestream {
namespace {

int open_retry(const char* path, int flags) {
    int fd;
    do fd = ::open(path, flags | O_RDONLY | O_CLOEXEC);
    while (fd < 0 && errno == EINTR);
    return fd;
}

int open_direct(const char* path) {
#if defined(__APPLE__)
    const int fd = open_retry(path, 0);
    if (fd >= 0) ::fcntl(fd, F_NOCACHE, 1);
    return fd;
#elif defined(O_DIRECT)
    return open_retry(path, O_DIRECT);
#else
    (void)path;
    return -1;
#endif
}

// Some systems refuse a pread of 2 GiB and more.
constexpr int64_t kMaxRead = int64_t{1} << 30;

ssize_t pread_retry(int fd, char* dest, int64_t nbytes, int64_t offset) {
    ssize_t got;
    do got = ::pread(fd, dest, static_cast<size_t>(nbytes < kMaxRead ? nbytes : kMaxRead), static_cast<off_t>(offset));
    while (got < 0 && errno == EINTR);
    return got;
}

bool refuses_direct(int error) { return error == EINVAL || error == EOPNOTSUPP || error == ENOTSUP; }

}  // namespace

File::File(const std::string& path, bool direct) : skewed_(direct) {
    buffered_fd_ = open_retry(path.c_str(), 0);
    if (buffered_fd_ < 0) throw std::system_error(errno, std::generic_category(), path);
#if defined(POSIX_FADV_RANDOM)
    // Experts lie anywhere: read-ahead beyond a range is waste, and the whole range is asked for at once.
    ::posix_fadvise(buffered_fd_, 0, 0, POSIX_FADV_RANDOM);
#endif
    if (direct) direct_fd_ = open_direct(path.c_str());
    direct_.store(direct_fd_ >= 0);
}

File::~File() {
    ::close(buffered_fd_);
    if (direct_fd_ >= 0) ::close(direct_fd_);
}

int64_t File::size() const {
    struct stat status;
    if (::fstat(buffered_fd_, &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
    return static_cast<int64_t>(status.st_size);
}

int64_t File::read_cached(int64_t offset, int64_t nbytes, char* dest) const {
    int64_t done = 0;
#if defined(__linux__) && defined(RWF_NOWAIT)
    if (direct()) return 0;
    while (done < nbytes) {
        iovec part{dest + done, static_cast<size_t>(nbytes - done)};
        const ssize_t got = ::preadv2(buffered_fd_, &part, 1, static_cast<off_t>(offset + done), RWF_NOWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;  // not cached, not supported here, or the end of the file: read() finds out
        done += got;
    }
#else
    (void)offset, (void)nbytes, (void)dest;
#endif
    return done;
}

ReadStatus File::read(int64_t offset, int64_t nbytes, char* dest) {
    return direct() ? read_direct(offset, nbytes, dest) : read_buffered(offset, nbytes, dest);
}

ReadStatus File::read_direct(int64_t offset, int64_t nbytes, char* dest) {
    const int64_t wanted = offset + nbytes;
    const int64_t end = round_up(wanted);
    for (int64_t at = round_down(offset); at < wanted;) {
        const ssize_t got = pread_retry(direct_fd_, dest + (at - offset), end - at, at);
        if (got < 0) {
            if (!refuses_direct(errno)) return {false, errno, at};
            direct_.store(false, std::memory_order_relaxed);
            return read_buffered(offset, nbytes, dest);
        }
        if (at + got >= wanted) break;  // a short read is fine once the wanted bytes are there
        const int64_t next = round_down(at + got);
        if (next == at) {  // less than a block: only a buffered read can go on from here
            const int64_t from = at > offset ? at : offset;
            return read_buffered(from, wanted - from, dest + (from - offset));
        }
        at = next;
    }
    return {};
}

ReadStatus File::read_buffered(int64_t offset, int64_t nbytes, char* dest) const {
    for (int64_t done = 0; done < nbytes;) {
        const ssize_t got = pread_retry(buffered_fd_, dest + done, nbytes - done, offset + done);
        if (got < 0) return {false, errno, offset + done};
        if (got == 0) return {false, 0, offset + done};
        done += got;
    }
    return {};
}

}  // namespace moestream
