// What the parser keeps of a kernel between reading its statements and decoding them.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "decode.h"
#include "fault.h"
#include "tokens.h"

namespace gpu {

Operand read_operand(Reader& reader);

struct Register {
  uint32_t width = 0;  // bytes a lane; 0: a predicate
  Row row = NONE;      // once something takes it
};

// Names between { and }.
struct Names {
  int outer = -1;
  std::unordered_map<std::string, Register> registers;
  std::unordered_map<std::string, std::pair<uint64_t, uint32_t>>
      families;  // %r<100>: how many, and their width
  std::unordered_map<std::string, uint32_t> labels;
  std::unordered_map<std::string, std::vector<std::string>> targets;
  std::map<std::string, Variable> variables;
};

// The register that a name means in a scope, or nullptr.
Register* find_register(std::vector<Names>& scopes, int scope, const std::string& name);

struct Line {  // a statement as it was read
  Statement statement;
  std::optional<Operand> guard;
  int scope = 0;
  uint32_t file = 0, line = 0, ptx_line = 0;
  std::string_view text;
};

struct KernelText {
  Kernel kernel;
  std::vector<Names> scopes;
  std::vector<Line> lines;
};

class KernelBuild final : public Build {
 public:
  KernelBuild(Program& program, KernelText& text, const std::map<std::string, Variable>& module_shared);

  void decode(const Decoders& decoders);  // all of the kernel

  Row row(const Operand& operand, uint32_t width) override;
  Row predicate(const Operand& operand) override;
  uint32_t width_of(const Operand& operand) const override;
  Row scratch(uint32_t width) override;
  void label(const std::string& name, int64_t* to) override;
  const Variable* variable(const std::string& name) const override;
  Row address(const Operand& operand, int64_t* offset) override;
  const std::vector<std::string>* targets(const std::string& name) const override;
  const std::string& target() const override { return program_.target; }
  const Row* keep(std::vector<Row> rows) override;
  int64_t* keep(std::vector<int64_t> numbers) override;
  const void* keep(std::shared_ptr<void> more) override;

 private:
  template <class Found>
  auto in_scopes(Found found) const -> decltype(found(std::declval<Names&>()));
  void place_variables();
  void note_variables(const Operand& operand, std::vector<Variable*>& used);
  void decode_line(const Decoders& decoders, Line& line, Instruction& to);
  [[noreturn]] void fail_at(const Line& line, const Fault& fault) const;
  bool is_register(const std::string& name) const;
  Row register_row(const std::string& name, uint32_t width);
  Row constant(uint32_t width, uint64_t bits);

  Program& program_;
  KernelText& text_;
  Kernel& kernel_;
  const std::map<std::string, Variable>& module_shared_;
  std::map<std::string, Variable> own_shared_;  // those of the module, as placed in this kernel
  std::map<std::pair<uint32_t, uint64_t>, Row> constants_;
  std::map<std::string, SpecialRow> specials_;
  int scope_ = 0;
};

}  // namespace gpu
