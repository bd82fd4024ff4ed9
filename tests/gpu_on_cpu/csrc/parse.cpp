// Reads a PTX module: its directives, variables and kernels.
#include <algorithm>
#include <cstring>
#include <map>

#include "fault.h"
#include "kernel_build.h"

namespace gpu {
namespace {

uint32_t width_of_type(const Reader& reader, const std::string& type) {
  static const std::map<std::string, uint32_t> widths = {
      {".pred", 0},   {".b8", 1},   {".u8", 1},  {".s8", 1},  {".b16", 2}, {".u16", 2},   {".s16", 2},
      {".f16", 2},    {".bf16", 2}, {".b32", 4}, {".u32", 4}, {".s32", 4}, {".f32", 4},   {".f16x2", 4},
      {".bf16x2", 4}, {".b64", 8},  {".u64", 8}, {".s64", 8}, {".f64", 8}, {".b128", 16},
  };
  const auto found = widths.find(type);
  if (found == widths.end()) {
    fail(Kind::unknown, "PTX line ", reader.peek().line, ": type ", type, " is not modelled");
  }
  return found->second;
}

uint64_t aligned(uint64_t offset, uint64_t to) { return (offset + to - 1) / to * to; }

class ModuleReader {
 public:
  explicit ModuleReader(Program& program) : program_(program), reader_(tokens_of(program.text)) {}

  void read() {
    while (!reader_.done()) read_module_item();
    program_.kernels.resize(kernels_.size());
    Decoders decoders;
    for (const auto add : {add_arithmetic, add_memory, add_copies, add_matrix, add_wgmma, add_control}) {
      add(decoders);
    }
    for (size_t i = 0; i < kernels_.size(); ++i) {
      KernelBuild(program_, kernels_[i], shared_).decode(decoders);
      program_.kernels[i] = std::move(kernels_[i].kernel);
    }
  }

 private:
  void read_module_item() {
    if (reader_.take(";")) return;
    if (read_anywhere()) return;
    const std::string first(reader_.peek().text);
    if (first == ".version" || first == ".address_size") {
      reader_.next();
      reader_.skip_line();
    } else if (reader_.take(".target")) {
      program_.target = reader_.name();
      reader_.skip_line();
    } else {
      read_linked_item();
    }
  }

  // What both a module and a kernel's body may hold.
  bool read_anywhere() {
    if (reader_.take(".file")) {
      const size_t number = static_cast<size_t>(reader_.integer());
      if (program_.files.size() <= number) program_.files.resize(number + 1);
      program_.files[number] = std::string(reader_.next().text);
      reader_.skip_line();
    } else if (reader_.take(".section")) {
      reader_.next();
      reader_.skip_block();
    } else if (reader_.take(".pragma")) {
      reader_.next();
      reader_.expect(";");
    } else {
      return false;
    }
    return true;
  }

  void read_linked_item() {
    bool external = false;
    while (reader_.is(".visible") || reader_.is(".extern") || reader_.is(".weak") || reader_.is(".common")) {
      external = external || reader_.is(".extern");
      reader_.next();
    }
    if (reader_.take(".entry")) {
      read_kernel();
    } else if (reader_.take(".func")) {
      // A function that a kernel calls is a fault at the call; one that nobody calls does no harm.
      while (!reader_.is("{") && !reader_.is(";")) reader_.next();
      if (!reader_.take(";")) reader_.skip_block();
    } else {
      Variable variable = read_variable(external);
      if (variable.space == Variable::Space::shared) {
        shared_[variable.name] = std::move(variable);
      } else {
        store(variable);
        program_.globals.push_back(std::move(variable));
      }
    }
  }

  // Global variables live in the program, and their offset is their address.
  void store(Variable& variable) {
    variable.initial.resize(variable.bytes);
    variable.offset = reinterpret_cast<uint64_t>(variable.initial.data());
    if (variable.offset % variable.align != 0) {
      fail(Kind::unknown, "the variable ", variable.name, " aligned to ", variable.align, " is not modelled");
    }
  }

  Variable read_variable(bool external) {
    static const std::map<std::string, Variable::Space> spaces = {{".param", Variable::Space::param},
                                                                  {".shared", Variable::Space::shared},
                                                                  {".global", Variable::Space::global},
                                                                  {".const", Variable::Space::constant},
                                                                  {".local", Variable::Space::local}};
    Variable variable;
    const auto space = spaces.find(std::string(reader_.peek().text));
    if (space == spaces.end()) reader_.fail_here("a directive");
    reader_.next();
    variable.space = space->second;
    const uint32_t width = read_type(variable);
    variable.name = reader_.name();
    variable.bytes = width;
    while (reader_.take("[")) {
      variable.bytes *= reader_.is("]") ? 0 : static_cast<uint64_t>(reader_.integer());
      reader_.expect("]");
    }
    if (reader_.take("=")) read_initial(variable, width);
    if (external && (variable.space != Variable::Space::shared || variable.bytes != 0)) {
      fail(Kind::unknown, "the variable ", variable.name, " is not in the module");
    }
    return variable;
  }

  // .align, type and .ptr with what it points to; gives the type's width.
  uint32_t read_type(Variable& variable) {
    uint32_t align = 0, width = 0, count = 1;
    while (reader_.peek().text[0] == '.') {
      const std::string word = reader_.name();
      if (word == ".ptr") {
        while (reader_.is(".global") || reader_.is(".shared") || reader_.is(".const") ||
               reader_.is(".local") || reader_.is(".param")) {
          reader_.next();
        }
        if (reader_.take(".align")) reader_.integer();
      } else if (word == ".align") {
        align = static_cast<uint32_t>(reader_.integer());
      } else if (word == ".v2" || word == ".v4") {
        count = word == ".v2" ? 2 : 4;
      } else {
        width = width_of_type(reader_, word);
      }
    }
    variable.align = std::max(align, width * count);
    return width * count;
  }

  void read_initial(Variable& variable, uint32_t width) {
    const Operand given = read_operand(reader_);
    const std::vector<Operand> values =
        given.is == Operand::Is::vector ? given.parts : std::vector<Operand>{given};
    variable.initial.resize(variable.bytes);
    if (values.size() * width > variable.bytes) reader_.fail_here("fewer values");
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i].is != Operand::Is::number && values[i].is != Operand::Is::real) {
        fail(Kind::unknown, "the variable ", variable.name, " starts with what is no number");
      }
      std::memcpy(variable.initial.data() + i * width, &values[i].bits, width);
    }
  }

  void read_kernel() {
    KernelText text;
    text.kernel.name = reader_.name();
    text.scopes.emplace_back();
    try {
      if (reader_.take("(")) read_params(text.kernel);
      while (!reader_.is("{")) read_kernel_directive(text.kernel);
      read_body(text);
    } catch (Fault& fault) {
      fault.message = text_of("kernel ", text.kernel.name, ": ", fault.message);
      throw;
    }
    kernels_.push_back(std::move(text));
  }

  void read_params(Kernel& kernel) {
    while (!reader_.take(")")) {
      Variable param = read_variable(false);
      param.offset = aligned(kernel.param_bytes, param.align);
      kernel.param_bytes = static_cast<uint32_t>(param.offset + param.bytes);
      kernel.params.push_back(std::move(param));
      reader_.take(",");
    }
  }

  void read_kernel_directive(Kernel& kernel) {
    const auto product = [&] {
      int64_t threads = 1;
      do {
        threads *= reader_.integer();
      } while (reader_.take(","));
      return static_cast<uint32_t>(threads);
    };
    if (reader_.is(".reqntid") || reader_.is(".maxntid")) {
      kernel.threads_required |= reader_.next().text == ".reqntid";
      kernel.max_threads = product();
    } else if (reader_.take(".minnctapersm")) {
      kernel.min_blocks = product();
    } else if (reader_.take(".maxnreg")) {
      kernel.max_registers = product();
    } else if (!read_anywhere() && !reader_.take(".noreturn")) {
      reader_.fail_here("a directive that is modelled");
    }
  }

  void read_body(KernelText& text) {
    reader_.expect("{");
    int scope = 0;
    file_ = line_ = 0;
    while (scope >= 0) {
      if (reader_.take("{")) {
        text.scopes.emplace_back().outer = scope;
        scope = static_cast<int>(text.scopes.size()) - 1;
      } else if (reader_.take("}")) {
        scope = text.scopes[scope].outer;
      } else if (!read_anywhere() && !read_declaration(text.scopes[scope])) {
        read_statement(text, scope);
      }
    }
    end_body(text);
  }

  bool read_declaration(Names& scope) {
    if (reader_.take(";")) return true;
    if (reader_.take(".loc")) {
      file_ = static_cast<uint32_t>(reader_.integer());
      line_ = static_cast<uint32_t>(reader_.integer());
      reader_.skip_line();
      return true;
    }
    if (reader_.take(".reg")) {
      read_registers(scope);
      return true;
    }
    if (reader_.peek().text[0] != '.') return false;
    if (reader_.is(".param"))
      fail(Kind::unknown, "PTX line ", reader_.peek().line, ": calls are not modelled");
    Variable variable = read_variable(false);
    reader_.expect(";");
    scope.variables[variable.name] = std::move(variable);
    return true;
  }

  void read_registers(Names& scope) {
    // A byte takes two, as in the hardware's registers nothing is smaller.
    const uint32_t declared = width_of_type(reader_, reader_.name());
    const uint32_t width = declared == 1 ? 2 : declared;
    do {
      const std::string name = reader_.name();
      if (reader_.take("<")) {
        scope.families[name] = {static_cast<uint64_t>(reader_.integer()), width};
        reader_.expect(">");
      } else {
        scope.registers[name] = {width, NONE};
      }
    } while (reader_.take(","));
    reader_.expect(";");
  }

  void read_statement(KernelText& text, int scope) {
    if (reader_.done()) reader_.fail_here("}");
    if (reader_.is(":", 1)) {
      read_label(text, text.scopes[scope]);
      return;
    }
    Line line;
    line.scope = scope;
    line.file = file_;
    line.line = line_;
    line.ptx_line = reader_.peek().line;
    const char* start = reader_.peek().text.data();
    if (reader_.take("@")) line.guard = read_operand(reader_);
    Statement& statement = line.statement;
    statement.opcode = reader_.name();
    for (size_t at = 0; at != std::string::npos;) {
      const size_t dot = statement.opcode.find('.', at);
      statement.parts.push_back(statement.opcode.substr(at, dot - at));
      at = dot == std::string::npos ? dot : dot + 1;
    }
    if (reader_.is("(") || statement.parts[0] == "call") {
      fail(Kind::unknown, "PTX line ", line.ptx_line, ": ", statement.opcode, " is not modelled");
    }
    if (line.guard) mark_registers(text, scope, *line.guard);
    while (!reader_.is(";")) {
      statement.operands.push_back(read_operand(reader_));
      mark_registers(text, scope, statement.operands.back());
      if (!reader_.is(";")) reader_.expect(",");
    }
    line.text = std::string_view(start, reader_.next().text.data() - start);
    text.lines.push_back(std::move(line));
  }

  // A register's name need not start with %: what was declared as one is one.
  void mark_registers(KernelText& text, int scope, Operand& operand) {
    for (Operand& part : operand.parts) mark_registers(text, scope, part);
    if (operand.is == Operand::Is::symbol && find_register(text.scopes, scope, operand.name) != nullptr) {
      operand.is = Operand::Is::reg;
    }
  }

  void read_label(KernelText& text, Names& scope) {
    const std::string name = reader_.name();
    reader_.expect(":");
    if (!reader_.take(".branchtargets")) {
      scope.labels[name] = static_cast<uint32_t>(text.lines.size());
      return;
    }
    do {
      scope.targets[name].push_back(reader_.name());
    } while (reader_.take(","));
    reader_.expect(";");
  }

  // Lanes that run past the last statement end there.
  void end_body(KernelText& text) {
    Line line;
    line.statement.opcode = "ret";
    line.statement.parts = {"ret"};
    line.file = file_;
    line.line = line_;
    line.ptx_line = reader_.peek().line;
    line.text = "ret";
    const bool ends = !text.lines.empty() && !text.lines.back().guard && text.lines.back().text == "ret";
    const auto at_end = [&](const auto& label) { return label.second == text.lines.size(); };
    const bool reached = std::any_of(text.scopes.begin(), text.scopes.end(), [&](const Names& scope) {
      return std::any_of(scope.labels.begin(), scope.labels.end(), at_end);
    });
    if (!ends || reached) text.lines.push_back(std::move(line));
  }

  Program& program_;
  Reader reader_;
  std::vector<KernelText> kernels_;
  std::map<std::string, Variable> shared_;  // of the module
  uint32_t file_ = 0, line_ = 0;
};

}  // namespace

std::unique_ptr<Program> parse(std::string text) {
  auto program = std::make_unique<Program>();
  program->text = std::move(text);
  ModuleReader(*program).read();
  return program;
}

}  // namespace gpu
