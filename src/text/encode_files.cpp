// Reader -> splitter -> units of about a megabyte -> encoder -> sink. The reader and the splitter
// run on the calling thread; units are encoded by up to `jobs` threads and handed on in order.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <future>
#include <utility>

#include "core/check.h"
#include "text/tokenize.h"

namespace hgrn {
namespace {

constexpr size_t kPiece = size_t(1) << 20;  // bytes read at once, and a unit's target size

// Text for one thread: segments to be encoded each by itself, with end-of-text tokens around them.
struct Unit {
  struct Segment {
    size_t end;  // in text; it begins where the one before it ends
    bool eos_before, eos_after;
  };
  std::string text;
  std::vector<Segment> segments;
};

std::vector<int32_t> encode_unit(const Tokenizer& tokenizer, const Unit& unit) {
  std::vector<int32_t> tokens;
  const std::string_view text = unit.text;
  size_t begin = 0;
  for (const Unit::Segment& segment : unit.segments) {
    if (segment.eos_before) tokens.push_back(tokenizer.eos());
    if (segment.end > begin) tokenizer.encode(text.substr(begin, segment.end - begin), tokens);
    if (segment.eos_after) tokens.push_back(tokenizer.eos());
    begin = segment.end;
  }
  return tokens;
}

class Encoder {
 public:
  using Sink = std::function<void(std::span<const int32_t>)>;
  Encoder(const Tokenizer& tokenizer, int jobs, const Sink& sink)
      : tokenizer_(tokenizer), jobs_(size_t(jobs)), sink_(sink) {}

  void add(std::string_view text, bool eos_before, bool eos_after) {
    unit_.text += text;
    unit_.segments.push_back({unit_.text.size(), eos_before, eos_after});
    if (unit_.text.size() >= kPiece || unit_.segments.size() >= kPiece / 16) submit();
  }
  void finish() {
    submit();
    while (!running_.empty()) hand_on();
  }
  int64_t tokens() const { return tokens_; }  // handed to the sink

 private:
  void submit() {
    if (unit_.segments.empty()) return;
    Unit unit = std::exchange(unit_, {});
    if (jobs_ == 1) {
      deliver(encode_unit(tokenizer_, unit));
      return;
    }
    if (running_.size() >= jobs_) hand_on();
    running_.push_back(std::async(std::launch::async, [this, unit = std::move(unit)] {
      return encode_unit(tokenizer_, unit);
    }));
  }
  void hand_on() {
    std::future<std::vector<int32_t>> first = std::move(running_.front());
    running_.pop_front();
    deliver(first.get());
  }
  void deliver(const std::vector<int32_t>& tokens) {
    tokens_ += int64_t(tokens.size());
    sink_(tokens);
  }

  const Tokenizer& tokenizer_;
  const size_t jobs_;
  const Sink& sink_;
  Unit unit_;
  int64_t tokens_ = 0;
  std::deque<std::future<std::vector<int32_t>>> running_;  // last: it waits for threads that use us
};

// Cuts what is read into documents or lines, and long ones into pieces at places where the
// tokenizer says that cutting changes nothing.
class Splitter {
 public:
  Splitter(const Tokenizer& tokenizer, const EncodeOptions& options, Encoder& encoder)
      : tokenizer_(tokenizer), options_(options), encoder_(encoder) {}

  void feed(std::string_view data) {
    pending_ += data;
    options_.line_end_token ? lines() : documents();
  }
  void end_of_file() {
    if (options_.line_end_token) {
      if (inside_ || !pending_.empty()) end_line(pending_);
    } else {
      end_document(pending_);
    }
    pending_.clear();
    scanned_ = 0;
  }
  int64_t documents_seen = 0, lines_seen = 0;

 private:
  void documents() {
    const std::string& separator = options_.document_separator;
    size_t begin = 0;
    if (!separator.empty()) {
      for (size_t at;
           (at = pending_.find(separator, std::max(begin, scanned_))) != std::string::npos;
           begin = at + separator.size())
        end_document(view(begin, at));
    }
    // The tail may hold the start of a separator whose rest is not read yet.
    const size_t held_back = separator.empty() ? 0 : separator.size() - 1;
    const size_t safe_end = std::max(begin, pending_.size() - std::min(held_back, pending_.size()));
    begin += early_piece(view(begin, safe_end));
    drop(begin, safe_end);
  }

  void lines() {
    size_t begin = 0;
    for (size_t at; (at = pending_.find('\n', std::max(begin, scanned_))) != std::string::npos;
         begin = at + 1)
      end_line(view(begin, at));
    const size_t scanned = pending_.size();
    if (scanned - begin >= wanted_) {  // a line longer than a piece
      if (!inside_) begin = scanned - strip_left(view(begin, scanned)).size();
      // Whitespace at the end may be the line's end, and so may the start of a character that is
      // whitespace: neither leaves yet.
      size_t end = std::max(begin, scanned - std::min<size_t>(3, scanned));
      while (end > begin && (static_cast<unsigned char>(pending_[end]) & 0xc0) == 0x80) --end;
      begin += early_piece(strip_right(view(begin, end)));
    }
    drop(begin, scanned);
  }

  // Hands on what may already leave of a document or line that has not ended; returns its bytes.
  size_t early_piece(std::string_view text) {
    if (text.size() < wanted_) return 0;
    const size_t n = tokenizer_.safe_prefix(text);
    // Where nothing may leave, asking again for every piece would be quadratic.
    wanted_ = n > 0 ? kPiece : 2 * wanted_;
    if (n == 0) return 0;
    encoder_.add(text.substr(0, n), !options_.line_end_token && !inside_, false);
    inside_ = true;
    return n;
  }

  void end_document(std::string_view rest) {
    if (!rest.empty()) encoder_.add(rest, !inside_, false);
    if (!rest.empty() || inside_) ++documents_seen;
    inside_ = false;
    wanted_ = kPiece;
  }
  void end_line(std::string_view rest) {
    encoder_.add(inside_ ? strip_right(rest) : strip(rest), false, true);
    ++lines_seen;
    inside_ = false;
    wanted_ = kPiece;
  }

  std::string_view view(size_t begin, size_t end) const {
    return std::string_view(pending_).substr(begin, end - begin);
  }
  void drop(size_t bytes, size_t scanned) {
    pending_.erase(0, bytes);
    scanned_ = scanned > bytes ? scanned - bytes : 0;
  }

  const Tokenizer& tokenizer_;
  const EncodeOptions& options_;
  Encoder& encoder_;
  std::string pending_;     // read, and not yet handed on
  size_t scanned_ = 0;      // no separator or line end starts before this in pending_
  size_t wanted_ = kPiece;  // bytes that a document or line must have before a piece of it leaves
  bool inside_ = false;     // pieces of this document or line have left
};

class File {
 public:
  explicit File(const std::string& path)
      : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    check(fd_ >= 0, Exit::data, "cannot open {}: {}; check the path and its permissions", path,
          std::strerror(errno));
  }
  ~File() { ::close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Up to a piece into `buffer`; empty at the end.
  std::string_view read(std::vector<char>& buffer) {
    buffer.resize(kPiece);
    ssize_t n;
    do n = ::read(fd_, buffer.data(), buffer.size());
    while (n < 0 && errno == EINTR);
    check(n >= 0, Exit::data, "cannot read {}: {}", path_, std::strerror(errno));
    return {buffer.data(), size_t(n)};
  }

 private:
  const std::string& path_;
  int fd_;
};

// Size in bytes, 0 for a pipe. Does not open it: a pipe can be opened once only.
int64_t checked_size(const std::string& path) {
  struct stat info;
  const bool found = ::stat(path.c_str(), &info) == 0 && ::access(path.c_str(), R_OK) == 0;
  check(found, Exit::data, "cannot open {}: {}; check the path and its permissions", path,
        std::strerror(errno));
  check(!S_ISDIR(info.st_mode), Exit::data, "{} is a folder; name the files in it", path);
  return S_ISREG(info.st_mode) ? int64_t(info.st_size) : 0;
}

class Meter {
 public:
  Meter(const TokenizeProgressFn& report, int64_t total) : report_(report) {
    progress_.total_bytes = total;
  }
  void update(int64_t bytes, int64_t tokens, bool last) {
    const Clock::time_point now = Clock::now();
    if (!report_ || (!last && now - shown_ < std::chrono::milliseconds(250))) return;
    shown_ = now;
    progress_.bytes = bytes;
    progress_.tokens = tokens;
    progress_.seconds = std::chrono::duration<double>(now - start_).count();
    report_(progress_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  const TokenizeProgressFn& report_;
  TokenizeProgress progress_;
  Clock::time_point start_ = Clock::now(), shown_ = start_;
};

}  // namespace

EncodeReport encode_files(const Tokenizer& tokenizer, const EncodeOptions& options,
                          const std::function<void(std::span<const int32_t>)>& sink,
                          const TokenizeProgressFn& progress) {
  check(options.jobs >= 1, Exit::usage, "--jobs {}: it must be at least 1", options.jobs);
  check(!options.line_end_token || options.document_separator.empty(), Exit::usage,
        "--line-end-token and --document-separator exclude each other: give one of them");
  int64_t total = 0;
  for (const std::string& path : options.files) total += checked_size(path);

  Encoder encoder(tokenizer, options.jobs, sink);
  Splitter splitter(tokenizer, options, encoder);
  Meter meter(progress, total);
  EncodeReport report;
  std::vector<char> buffer;
  for (const std::string& path : options.files) {
    File file(path);
    for (std::string_view data; !(data = file.read(buffer)).empty();) {
      report.bytes += int64_t(data.size());
      splitter.feed(data);
      meter.update(report.bytes, encoder.tokens(), false);
    }
    splitter.end_of_file();
  }
  encoder.finish();
  meter.update(report.bytes, encoder.tokens(), true);
  report.tokens = encoder.tokens();
  report.documents = splitter.documents_seen;
  report.lines = splitter.lines_seen;
  return report;
}

}  // namespace hgrn
