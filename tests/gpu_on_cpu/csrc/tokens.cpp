#include "tokens.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "fault.h"

namespace gpu {
namespace {

bool in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.';
}

class Scanner {
 public:
  explicit Scanner(std::string_view ptx) : ptx_(ptx) {}

  std::vector<Token> all() {
    std::vector<Token> tokens;
    while (skip_blank(), at_ < ptx_.size()) tokens.push_back(one());
    tokens.push_back({Token::Is::end, "the end", line_});
    return tokens;
  }

 private:
  char ahead(size_t by) const { return at_ + by < ptx_.size() ? ptx_[at_ + by] : '\0'; }

  void skip_to(std::string_view end) {
    const size_t found = std::min(ptx_.find(end, at_), ptx_.size());
    line_ += std::count(ptx_.begin() + at_, ptx_.begin() + found, '\n');
    at_ = found;
  }

  void skip_blank() {
    for (; at_ < ptx_.size(); ++at_) {
      if (ptx_[at_] == '\n') {
        ++line_;
      } else if (ptx_[at_] == '/' && ahead(1) == '/') {
        skip_to("\n");
        if (at_ < ptx_.size()) ++line_;
      } else if (ptx_[at_] == '/' && ahead(1) == '*') {
        at_ += 2;
        skip_to("*/");
        ++at_;
      } else if (!std::isspace(static_cast<unsigned char>(ptx_[at_])) && ptx_[at_] != '\0') {
        return;
      }
    }
  }

  Token one() {
    const size_t start = at_;
    const uint32_t line = line_;
    if (ptx_[at_] == '"') {
      ++at_;
      skip_to("\"");
      return {Token::Is::text, ptx_.substr(start + 1, at_++ - start - 1), line};
    }
    if (!in_word(ptx_[at_]) && ptx_[at_] != '%') return {Token::Is::sign, ptx_.substr(at_++, 1), line};
    for (++at_; in_word(ahead(0)) || colons(); at_ += colons() ? 2 : 1) {
    }
    return {Token::Is::word, ptx_.substr(start, at_ - start), line};
  }

  // The two colons within a modifier, as in shared::cta.
  bool colons() const { return ahead(0) == ':' && ahead(1) == ':' && in_word(ahead(2)); }

  std::string_view ptx_;
  size_t at_ = 0;
  uint32_t line_ = 1;
};

}  // namespace

std::vector<Token> tokens_of(std::string_view ptx) { return Scanner(ptx).all(); }

bool Reader::is(std::string_view text, size_t ahead) const {
  const Token& token = peek(ahead);
  return token.text == text && (token.is == Token::Is::word || token.is == Token::Is::sign);
}

bool Reader::take(std::string_view text) {
  const bool found = is(text);
  if (found) next();
  return found;
}

void Reader::expect(std::string_view text) {
  if (!take(text)) fail_here(text);
}

std::string Reader::name() {
  if (peek().is != Token::Is::word) fail_here("a name");
  return std::string(next().text);
}

bool Reader::at_number() const {
  const size_t sign = is("-") || is("+");
  return peek(sign).is == Token::Is::word && std::isdigit(static_cast<unsigned char>(peek(sign).text[0]));
}

int64_t Reader::integer() {
  if (!at_number()) fail_here("a number");
  const bool negative = is("-");
  if (negative || is("+")) next();
  std::string text(next().text);
  if (text.back() == 'U') text.pop_back();
  const bool binary = text.size() > 2 && (text[1] == 'b' || text[1] == 'B');
  char* end = nullptr;
  const uint64_t value =
      binary ? std::strtoull(text.c_str() + 2, &end, 2) : std::strtoull(text.c_str(), &end, 0);
  if (*end != '\0')
    fail(Kind::unknown, "PTX line ", peek().line, ": the number ", text, " is not understood");
  return static_cast<int64_t>(negative ? -value : value);
}

void Reader::skip_line() {
  const uint32_t line = tokens_[at_ - 1].line;
  while (!done() && peek().line == line) next();
}

void Reader::skip_block() {
  expect("{");
  for (int depth = 1; depth > 0; next()) {
    if (done()) fail_here("}");
    depth += is("{") - is("}");
  }
}

void Reader::fail_here(std::string_view wanted) const {
  fail(Kind::unknown, "PTX line ", peek().line, ": \"", peek().text, "\" where ", wanted, " was expected");
}

}  // namespace gpu
