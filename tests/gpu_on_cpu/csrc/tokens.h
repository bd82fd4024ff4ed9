// Words of a PTX module, with their lines.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gpu {

struct Token {
  enum class Is : uint8_t { word, text, sign, end };
  Is is = Is::end;
  std::string_view
      text;  // a word (opcode, name, number, directive), a quoted text's content, or one character
  uint32_t line = 0;
};

std::vector<Token> tokens_of(std::string_view ptx);

// Steps through tokens; what is not as expected is a fault that names the PTX line.
class Reader {
 public:
  explicit Reader(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& next() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool done() const { return peek().is == Token::Is::end; }
  bool is(std::string_view text, size_t ahead = 0) const;  // a word or a sign
  bool take(std::string_view text);                        // the same, and steps over it
  void expect(std::string_view text);
  std::string name();
  bool at_number() const;
  int64_t integer();  // with its sign
  void skip_line();   // what is left of the line of the last token
  void skip_block();  // from { to the } of it
  [[noreturn]] void fail_here(std::string_view wanted) const;

 private:
  std::vector<Token> tokens_;
  size_t at_ = 0;
};

}  // namespace gpu
