#include "text/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "core/check.h"

namespace hgrn {
namespace {

constexpr size_t kJitStackStart = 32 << 10, kJitStackMost = 16 << 20;

using Context = std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)>;

std::string error_text(int code) {
  PCRE2_UCHAR text[256];
  if (pcre2_get_error_message(code, text, sizeof text) < 0) return fmt::format("error {}", code);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct Pattern::Impl {
  pcre2_code* code = nullptr;
  bool jit = false, jit_partial = false;
  ~Impl() { pcre2_code_free(code); }
};

struct Pattern::Matcher::Impl {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(kJitStackStart, kJitStackMost, nullptr);
  Impl() {
    check(data && context, "no memory for a regular expression's match");
    if (stack) pcre2_jit_stack_assign(context, nullptr, stack);
    // Matching is linear in the patterns that tokenizers use; a long run of one character may still
    // take more steps than PCRE2's default allows.
    pcre2_set_match_limit(context, UINT32_MAX);
    pcre2_set_heap_limit(context, 1u << 20);  // KiB
  }
  ~Impl() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    if (stack) pcre2_jit_stack_free(stack);
  }
};

Pattern::Matcher::Matcher() : impl_(std::make_unique<Impl>()) {}
Pattern::Matcher::~Matcher() = default;
Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;

Pattern::Pattern(std::string_view pattern, const std::string& where)
    : impl_(std::make_unique<Impl>()) {
  const std::string translated = to_pcre2(pattern, where);
  const Context context(pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  check(context != nullptr, "no memory for a regular expression");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  impl_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | PCRE2_MULTILINE,
                              &error, &offset, context.get());
  check(impl_->code != nullptr, Exit::data,
        "{}: the regular expression cannot be compiled: {} (near byte {} of {})", where,
        error_text(error), offset, translated);
  uint32_t empty = 0;
  pcre2_pattern_info(impl_->code, PCRE2_INFO_MATCHEMPTY, &empty);
  check(empty == 0, Exit::data,
        "{}: the regular expression {} can match nothing at all; make it match one character or "
        "more",
        where, pattern);
  impl_->jit = pcre2_jit_compile(impl_->code, PCRE2_JIT_COMPLETE) == 0;
  impl_->jit_partial = pcre2_jit_compile(impl_->code, PCRE2_JIT_PARTIAL_HARD) == 0;
}

namespace {

// False: no match, or with `options` a partial one.
bool run(const pcre2_code* code, bool jit, uint32_t options, std::string_view text, size_t from,
         pcre2_match_data* data, pcre2_match_context* context, Pattern::Match& match) {
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  int rc = jit ? pcre2_jit_match(code, subject, text.size(), from, options, data, context)
               : pcre2_match(code, subject, text.size(), from, options | PCRE2_NO_UTF_CHECK, data,
                             context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
    rc = pcre2_match(code, subject, text.size(), from, options | PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                     data, context);
  if (rc == PCRE2_ERROR_NOMATCH || rc == PCRE2_ERROR_PARTIAL) return false;
  check(rc >= 0, Exit::failed, "matching the tokenizer's regular expression failed: {}",
        error_text(rc));
  const size_t* span = pcre2_get_ovector_pointer(data);
  match = {span[0], span[1]};
  return true;
}

}  // namespace

bool Pattern::find(std::string_view text, size_t from, Matcher& m, Match& match) const {
  return run(impl_->code, impl_->jit, 0, text, from, m.impl_->data, m.impl_->context, match);
}

bool Pattern::find_final(std::string_view text, size_t from, Matcher& m, Match& match) const {
  return run(impl_->code, impl_->jit_partial, PCRE2_PARTIAL_HARD, text, from, m.impl_->data,
             m.impl_->context, match);
}

std::string pcre2_version() {
  char version[64] = "", unicode[64] = "";
  pcre2_config(PCRE2_CONFIG_VERSION, version);
  pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, unicode);
  return fmt::format("{}, Unicode {}",
                     std::string(version).substr(0, std::string(version).find(' ')), unicode);
}

}  // namespace hgrn
