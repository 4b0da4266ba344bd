// Reader -> splitter -> units of about a megabyte -> encoder -> sinks. The reader and the splitter
// run on the calling thread; units are encoded (and JSON lines parsed) by up to `jobs` threads and
// handed on in order.
#include <algorithm>
#include <array>
#include <chrono>
#include <deque>
#include <future>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "text/json_document.h"
#include "text/text_input.h"
#include "text/tokenize.h"

namespace hgrn {
namespace {

constexpr size_t kPiece = size_t(1) << 20;  // bytes read at once, and a unit's target size
constexpr size_t kLongestJsonLine = size_t(1) << 30;

// Text for one thread: segments to be encoded each by itself, with end-of-text tokens around them.
struct Unit {
  struct Segment {
    size_t end;  // in text; it begins where the one before it ends
    bool eos_before, eos_after;
    bool valid;                         // of a document of the validation part
    int64_t line = 0;                   // > 0: a line of JSON, and its number
    const std::string* file = nullptr;  // of that line
  };
  std::string text;
  std::vector<Segment> segments;
};

// The tokens of a unit: [0] training part, or all, [1] validation part.
struct Encoded {
  std::array<std::vector<int32_t>, 2> tokens;
  std::array<int64_t, 2> documents = {};
};

// A document belongs to the validation part where the hash of its first bytes falls into the
// fraction. Not of all its bytes: a document longer than memory must be placed before its end.
bool in_validation(std::string_view document, double fraction) {
  if (fraction <= 0) return false;
  const uint64_t hash = xxh3(document.data(), std::min(document.size(), kPiece));
  return double(hash >> 11) * 0x1p-53 < fraction;
}

Encoded encode_unit(const Tokenizer& tokenizer, const EncodeOptions& options, const Unit& unit) {
  Encoded e;
  size_t begin = 0;
  std::string document;
  for (const Unit::Segment& segment : unit.segments) {
    std::string_view text = std::string_view(unit.text).substr(begin, segment.end - begin);
    begin = segment.end;
    bool valid = segment.valid;
    if (segment.line > 0) {
      document = json_document(text, options.json_key, *segment.file, segment.line);
      if (document.empty()) continue;
      text = document;
      valid = in_validation(text, options.valid_fraction);
    }
    std::vector<int32_t>& tokens = e.tokens[valid ? 1 : 0];
    if (segment.eos_before) tokens.push_back(tokenizer.eos()), ++e.documents[valid ? 1 : 0];
    if (!text.empty()) tokenizer.encode(text, tokens);
    if (segment.eos_after) tokens.push_back(tokenizer.eos());
  }
  return e;
}

class Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, const EncodeOptions& options, const TokensFn& sink,
          const TokensFn& valid_sink)
      : tokenizer_(tokenizer), options_(options), sinks_{&sink, &valid_sink} {}

  void add(std::string_view text, bool eos_before, bool eos_after, bool valid) {
    unit_.text += text;
    unit_.segments.push_back({unit_.text.size(), eos_before, eos_after, valid});
    submit_if_full();
  }
  void add_json(std::string_view line, const std::string& file, int64_t number) {
    unit_.text += line;
    unit_.segments.push_back({unit_.text.size(), true, false, false, number, &file});
    submit_if_full();
  }
  void finish() {
    submit();
    while (!running_.empty()) hand_on();
  }
  // Handed to the sinks.
  int64_t tokens() const { return tokens_[0] + tokens_[1]; }
  int64_t documents() const { return documents_[0] + documents_[1]; }
  int64_t valid_tokens() const { return tokens_[1]; }
  int64_t valid_documents() const { return documents_[1]; }

 private:
  void submit_if_full() {
    if (unit_.text.size() >= kPiece || unit_.segments.size() >= kPiece / 16) submit();
  }
  void submit() {
    if (unit_.segments.empty()) return;
    Unit unit = std::exchange(unit_, {});
    if (options_.jobs == 1) {
      deliver(encode_unit(tokenizer_, options_, unit));
      return;
    }
    if (running_.size() >= size_t(options_.jobs)) hand_on();
    running_.push_back(std::async(std::launch::async, [this, unit = std::move(unit)] {
      return encode_unit(tokenizer_, options_, unit);
    }));
  }
  void hand_on() {
    std::future<Encoded> first = std::move(running_.front());
    running_.pop_front();
    deliver(first.get());
  }
  void deliver(const Encoded& e) {
    for (size_t part : {0, 1}) {
      tokens_[part] += int64_t(e.tokens[part].size());
      documents_[part] += e.documents[part];
      if (!e.tokens[part].empty()) (*sinks_[part])(e.tokens[part]);
    }
  }

  const Tokenizer& tokenizer_;
  const EncodeOptions& options_;
  const std::array<const TokensFn*, 2> sinks_;
  Unit unit_;
  std::array<int64_t, 2> tokens_ = {}, documents_ = {};
  std::deque<std::future<Encoded>> running_;  // last: it waits for threads that use us
};

// Cuts what is read into documents or lines, and long ones into pieces at places where the
// tokenizer says that cutting changes nothing.
class Splitter {
 public:
  Splitter(const Tokenizer& tokenizer, const EncodeOptions& options, Encoder& encoder)
      : tokenizer_(tokenizer), options_(options), encoder_(encoder) {}

  void begin_file(const std::string& name) {
    file_ = &name;
    json_line_ = 0;
  }
  void feed(std::string_view data) {
    pending_ += data;
    if (!options_.json_key.empty())
      json_lines();
    else
      options_.line_end_token ? lines() : documents();
  }
  void end_of_file() {
    if (!options_.json_key.empty()) {
      end_json_line(pending_);
    } else if (options_.line_end_token) {
      if (inside_ || !pending_.empty()) end_line(pending_);
    } else {
      end_document(pending_);
    }
    pending_.clear();
    scanned_ = 0;
  }
  int64_t lines_seen = 0;  // only with line_end_token

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

  void json_lines() {
    size_t begin = 0;
    for (size_t at; (at = pending_.find('\n', std::max(begin, scanned_))) != std::string::npos;
         begin = at + 1)
      end_json_line(view(begin, at));
    const size_t scanned = pending_.size();
    check(scanned - begin < kLongestJsonLine, Exit::data,
          "{}:{}: longer than {} MiB; is this file one JSON object a line?", *file_, json_line_ + 1,
          kLongestJsonLine >> 20);
    drop(begin, scanned);
  }

  // Hands on what may already leave of a document or line that has not ended; returns its bytes.
  size_t early_piece(std::string_view text) {
    if (text.size() < wanted_) return 0;
    const size_t n = tokenizer_.safe_prefix(text);
    // Where nothing may leave, asking again for every piece would be quadratic.
    wanted_ = n > 0 ? kPiece : 2 * wanted_;
    if (n == 0) return 0;
    if (!inside_) valid_ = in_validation(text, options_.valid_fraction);
    encoder_.add(text.substr(0, n), !options_.line_end_token && !inside_, false, valid_);
    inside_ = true;
    return n;
  }

  void end_document(std::string_view rest) {
    if (!inside_) valid_ = in_validation(rest, options_.valid_fraction);
    if (!rest.empty()) encoder_.add(rest, !inside_, false, valid_);
    inside_ = false;
    wanted_ = kPiece;
  }
  void end_json_line(std::string_view line) {
    ++json_line_;
    if (!strip(line).empty()) encoder_.add_json(line, *file_, json_line_);
  }
  void end_line(std::string_view rest) {
    encoder_.add(inside_ ? strip_right(rest) : strip(rest), false, true, false);
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
  bool valid_ = false;      // this document is of the validation part
  const std::string* file_ = nullptr;
  int64_t json_line_ = 0;  // number of the last one that ended
};

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

void check_options(const EncodeOptions& o, bool has_valid_sink) {
  check(o.jobs >= 1, Exit::usage, "--jobs {}: it must be at least 1", o.jobs);
  const bool separated = !o.document_separator.empty(), json = !o.json_key.empty();
  const auto exclude = [](bool both, const char* a, const char* b) {
    check(!both, Exit::usage, "{} and {} exclude each other: give one of them", a, b);
  };
  exclude(o.line_end_token && separated, "--line-end-token", "--document-separator");
  exclude(o.line_end_token && json, "--line-end-token", "--json-key");
  exclude(separated && json, "--document-separator", "--json-key");
  check(o.valid_fraction >= 0 && o.valid_fraction < 1, Exit::usage,
        "--valid-fraction {}: it must be at least 0 and less than 1", o.valid_fraction);
  check(o.valid_fraction == 0 || !o.line_end_token, Exit::usage,
        "--valid-fraction splits by documents, which --line-end-token does not keep; tokenize a "
        "validation file of its own");
  check(o.valid_fraction == 0 || has_valid_sink, "valid_fraction without a sink");
  check(std::count(o.files.begin(), o.files.end(), "-") <= 1, Exit::usage,
        "-: standard input is named twice; it can be read once");
}

}  // namespace

EncodeReport encode_files(const Tokenizer& tokenizer, const EncodeOptions& options,
                          const TokensFn& sink, const TokenizeProgressFn& progress,
                          const TokensFn& valid_sink) {
  check_options(options, bool(valid_sink));
  int64_t total = 0;
  bool known = true;  // a pipe's size is not
  for (const std::string& path : options.files) {
    const int64_t size = text_input_size(path);
    total += size;
    known = known && size >= 0;
  }

  Encoder encoder(tokenizer, options, sink, valid_sink);
  Splitter splitter(tokenizer, options, encoder);
  Meter meter(progress, known ? total : 0);
  EncodeReport report;
  std::vector<char> buffer;
  for (const std::string& path : options.files) {
    TextInput input(path);
    splitter.begin_file(path);
    for (std::string_view data;
         !(data = input.read(buffer, kPiece, options.interrupted)).empty();) {
      report.bytes += int64_t(data.size());
      splitter.feed(data);
      if (options.interrupted) options.interrupted();
      meter.update(report.bytes, encoder.tokens(), false);
    }
    splitter.end_of_file();
  }
  encoder.finish();
  meter.update(report.bytes, encoder.tokens(), true);
  report.tokens = encoder.tokens();
  report.documents = encoder.documents();
  report.valid_tokens = encoder.valid_tokens();
  report.valid_documents = encoder.valid_documents();
  report.lines = splitter.lines_seen;
  return report;
}

}  // namespace hgrn
