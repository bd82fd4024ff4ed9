// Gives a kernel's operands their rows, and has its statements decoded.
#include "kernel_build.h"

#include <algorithm>
#include <cstring>

namespace gpu {
namespace {

constexpr uint32_t ROW_ALIGN = 64;  // a cache line

constexpr uint32_t SPECIAL_BYTES = 4;  // a lane, of each of them

const std::unordered_map<std::string, Special>& special_registers() {
  using S = Special;
  static const std::unordered_map<std::string, Special> names = {
      {"%tid.x", S::tid_x},
      {"%tid.y", S::tid_y},
      {"%tid.z", S::tid_z},
      {"%ntid.x", S::ntid_x},
      {"%ntid.y", S::ntid_y},
      {"%ntid.z", S::ntid_z},
      {"%ctaid.x", S::ctaid_x},
      {"%ctaid.y", S::ctaid_y},
      {"%ctaid.z", S::ctaid_z},
      {"%nctaid.x", S::nctaid_x},
      {"%nctaid.y", S::nctaid_y},
      {"%nctaid.z", S::nctaid_z},
      {"%laneid", S::laneid},
      {"%warpid", S::warpid},
      {"%nwarpid", S::nwarpid},
      {"%smid", S::smid},
      {"%nsmid", S::nsmid},
      {"%clusterid.x", S::clusterid_x},
      {"%nclusterid.x", S::nclusterid_x},
      {"%cluster_ctaid.x", S::cluster_ctaid_x},
      {"%cluster_ctarank", S::cluster_ctarank},
      {"%cluster_nctarank", S::cluster_nctarank},
      {"%lanemask_eq", S::lanemask_eq},
      {"%lanemask_lt", S::lanemask_lt},
      {"%lanemask_le", S::lanemask_le},
      {"%lanemask_gt", S::lanemask_gt},
      {"%lanemask_ge", S::lanemask_ge},
      {"%dynamic_smem_size", S::dynamic_smem_size},
      {"%total_smem_size", S::total_smem_size},
  };
  return names;
}

uint64_t aligned(uint64_t offset, uint64_t to) { return (offset + to - 1) / to * to; }

uint64_t real_bits(const Operand& real, uint32_t width) {
  float narrow;
  double wide;
  std::memcpy(&narrow, &real.bits, sizeof narrow);
  std::memcpy(&wide, &real.bits, sizeof wide);
  if (real.is_float32 == (width == 4)) return real.bits;
  uint64_t bits = 0;
  if (real.is_float32) {
    wide = narrow;
    std::memcpy(&bits, &wide, sizeof wide);
  } else {
    narrow = static_cast<float>(wide);
    std::memcpy(&bits, &narrow, sizeof narrow);
  }
  return bits;
}

}  // namespace

Register* find_register(std::vector<Names>& scopes, int scope, const std::string& name) {
  const size_t last = name.find_last_not_of("0123456789");
  const size_t digits = last == std::string::npos ? 0 : last + 1;
  for (; scope >= 0; scope = scopes[scope].outer) {
    Names& at = scopes[scope];
    const auto found = at.registers.find(name);
    if (found != at.registers.end()) return &found->second;
    const auto family = digits < name.size() ? at.families.find(name.substr(0, digits)) : at.families.end();
    if (family != at.families.end() && std::stoull(name.substr(digits)) < family->second.first) {
      return &(at.registers[name] = {family->second.second, NONE});
    }
  }
  return nullptr;
}

bool Statement::has(std::string_view part) const {
  understood.resize(parts.size());
  bool found = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i] == part) found = understood[i] = true;
  }
  return found;
}

KernelBuild::KernelBuild(Program& program, KernelText& text,
                         const std::map<std::string, Variable>& module_shared)
    : program_(program), text_(text), kernel_(text.kernel), module_shared_(module_shared) {}

// What the first scope that knows a name has for it, from the statement's own outwards.
template <class Found>
auto KernelBuild::in_scopes(Found found) const -> decltype(found(std::declval<Names&>())) {
  for (int at = scope_; at >= 0; at = text_.scopes[at].outer) {
    if (auto result = found(text_.scopes[at])) return result;
  }
  return nullptr;
}

void KernelBuild::decode(const Decoders& decoders) {
  place_variables();
  kernel_.instructions.resize(text_.lines.size());
  for (size_t pc = 0; pc < text_.lines.size(); ++pc) {
    kernel_.instructions[pc].pc = static_cast<uint32_t>(pc);
    decode_line(decoders, text_.lines[pc], kernel_.instructions[pc]);
  }
}

void KernelBuild::decode_line(const Decoders& decoders, Line& line, Instruction& to) {
  const Statement& statement = line.statement;
  scope_ = line.scope;
  to.file = line.file;
  to.line = line.line;
  to.ptx_line = line.ptx_line;
  to.text = line.text;
  statement.understood.assign(statement.parts.size(), false);
  statement.understood[0] = true;
  try {
    if (line.guard) {
      to.guard = predicate(*line.guard);
      to.guard_negated = line.guard->negated;
    }
    const auto decoder = decoders.find(statement.parts[0]);
    if (decoder == decoders.end()) fail(Kind::unknown, "the opcode ", statement.opcode, " is not modelled");
    if (!decoder->second(statement, *this, to)) {
      fail(Kind::unknown, "this form of ", statement.opcode, " is not modelled");
    }
    const auto missed = std::find(statement.understood.begin(), statement.understood.end(), false);
    if (missed != statement.understood.end()) {
      fail(Kind::unknown, '.', statement.parts[missed - statement.understood.begin()], " of ",
           statement.opcode, " is not modelled");
    }
  } catch (const Fault& fault) {
    fail_at(line, fault);
  }
}

void KernelBuild::fail_at(const Line& line, const Fault& fault) const {
  const bool known = line.file < program_.files.size() && line.line != 0;
  const std::string source = known ? text_of(", ", program_.files[line.file], ':', line.line) : "";
  fail(fault.kind, fault.message, "\n  kernel ", kernel_.name, source, ", PTX line ", line.ptx_line, ": ",
       line.text);
}

// Shared variables of the module count for the kernels that name them. The launch's dynamic shared memory,
// which all .extern ones are, follows the others.
void KernelBuild::place_variables() {
  std::vector<Variable*> used;
  for (const Line& line : text_.lines) {
    scope_ = line.scope;
    for (const Operand& operand : line.statement.operands) note_variables(operand, used);
  }
  const auto last =
      std::stable_partition(used.begin(), used.end(), [](Variable* v) { return v->bytes != 0; });
  uint32_t dynamic_align = 1;
  std::for_each(last, used.end(), [&](Variable* v) { dynamic_align = std::max(dynamic_align, v->align); });
  for (auto at = used.begin(); at != used.end(); ++at) {
    Variable& variable = **at;
    const bool shared = variable.space == Variable::Space::shared;
    uint32_t& end = shared ? kernel_.shared_bytes : kernel_.local_bytes;
    variable.offset = aligned(end, at < last ? variable.align : dynamic_align);
    end = static_cast<uint32_t>(variable.offset + variable.bytes);
    (shared ? kernel_.shared : kernel_.local).push_back(variable);
  }
}

void KernelBuild::note_variables(const Operand& operand, std::vector<Variable*>& used) {
  for (const Operand& part : operand.parts) note_variables(part, used);
  if (operand.is != Operand::Is::symbol && operand.is != Operand::Is::address) return;
  Variable* found = in_scopes([&](Names& scope) {
    const auto at = scope.variables.find(operand.name);
    return at == scope.variables.end() ? nullptr : &at->second;
  });
  const auto of_module = module_shared_.find(operand.name);
  if (found == nullptr && of_module != module_shared_.end()) {
    found = &own_shared_.insert(*of_module).first->second;
  }
  if (found != nullptr && std::find(used.begin(), used.end(), found) == used.end()) used.push_back(found);
}

const Variable* KernelBuild::variable(const std::string& name) const {
  const Variable* local = in_scopes([&](Names& scope) {
    const auto at = scope.variables.find(name);
    return at == scope.variables.end() ? nullptr : &at->second;
  });
  if (local != nullptr) return local;
  const auto shared = own_shared_.find(name);
  if (shared != own_shared_.end()) return &shared->second;
  for (const std::vector<Variable>* all : {&kernel_.params, &program_.globals}) {
    for (const Variable& variable : *all) {
      if (variable.name == name) return &variable;
    }
  }
  return nullptr;
}

bool KernelBuild::is_register(const std::string& name) const {
  return special_registers().contains(name) || find_register(text_.scopes, scope_, name) != nullptr;
}

Row KernelBuild::register_row(const std::string& name, uint32_t width) {
  Register* found = find_register(text_.scopes, scope_, name);
  if (found == nullptr) fail(Kind::unknown, "the register ", name, " was not declared");
  if (found->width != width) {
    fail(Kind::malformed, name,
         found->width == 0 ? " is a predicate" : text_of(" has ", found->width, " bytes"), " where ",
         width == 0 ? "a predicate" : text_of(width, " bytes"), " are taken");
  }
  if (found->row == NONE) found->row = scratch(width);
  return found->row;
}

Row KernelBuild::row(const Operand& operand, uint32_t width) {
  switch (operand.is) {
    case Operand::Is::sink:
      return NONE;
    case Operand::Is::number:
      return constant(width, operand.bits);
    case Operand::Is::real:
      if (width != 4 && width != 8) fail(Kind::malformed, "a real number where ", width, " bytes are taken");
      return constant(width, real_bits(operand, width));
    case Operand::Is::symbol:
      if (const Variable* found = variable(operand.name))
        return constant(width, found->offset + operand.offset);
      fail(Kind::unknown, "the variable ", operand.name, " was not declared");
    case Operand::Is::reg:
      break;
    default:
      fail(Kind::malformed, "a vector or an address where a single value is taken");
  }
  if (operand.negated) fail(Kind::malformed, '!', operand.name, " where no predicate is taken");
  const auto special = special_registers().find(operand.name);
  if (special == special_registers().end()) return register_row(operand.name, width);
  if (width != SPECIAL_BYTES) fail(Kind::unknown, operand.name, " as ", width, " bytes is not modelled");
  auto [at, fresh] = specials_.try_emplace(operand.name);
  if (fresh) {
    at->second = {special->second, scratch(width)};
    kernel_.specials.push_back(at->second);
  }
  return at->second.row;
}

Row KernelBuild::predicate(const Operand& operand) {
  if (operand.is == Operand::Is::sink) return NONE;
  if (operand.is == Operand::Is::number) return constant(0, operand.bits != 0);
  if (operand.is != Operand::Is::reg) fail(Kind::malformed, "no predicate where one is taken");
  return register_row(operand.name, 0);
}

uint32_t KernelBuild::width_of(const Operand& operand) const {
  if (operand.is != Operand::Is::reg && !is_register(operand.name)) return 8;
  if (special_registers().contains(operand.name)) return SPECIAL_BYTES;
  const Register* found = find_register(text_.scopes, scope_, operand.name);
  if (found == nullptr) fail(Kind::unknown, "the register ", operand.name, " was not declared");
  return found->width;
}

Row KernelBuild::scratch(uint32_t width) {
  const Row row = kernel_.frame_bytes;
  kernel_.frame_bytes += static_cast<uint32_t>(aligned(std::max(width * LANES, 1u), ROW_ALIGN));
  return row;
}

Row KernelBuild::constant(uint32_t width, uint64_t bits) {
  if (width > 8) fail(Kind::unknown, "a constant of ", width, " bytes is not modelled");
  if (width != 0 && width < 8) bits &= (uint64_t{1} << (8 * width)) - 1;
  auto [at, fresh] = constants_.try_emplace({width, bits}, NONE);
  if (fresh) {
    at->second = scratch(width);
    kernel_.constants.push_back({at->second, width, bits});
  }
  return at->second;
}

void KernelBuild::label(const std::string& name, int64_t* to) {
  const uint32_t* pc = in_scopes([&](Names& scope) -> uint32_t* {
    const auto found = scope.labels.find(name);
    return found == scope.labels.end() ? nullptr : &found->second;
  });
  if (pc == nullptr) fail(Kind::malformed, "the label ", name, " is not in the kernel");
  *to = *pc;
}

Row KernelBuild::address(const Operand& operand, int64_t* offset) {
  if (operand.is != Operand::Is::address) fail(Kind::malformed, "no address where one is taken");
  *offset = operand.offset;
  if (operand.name.empty()) return constant(8, 0);
  Operand base;
  base.is = is_register(operand.name) ? Operand::Is::reg : Operand::Is::symbol;
  base.name = operand.name;
  return row(base, width_of(base));
}

const std::vector<std::string>* KernelBuild::targets(const std::string& name) const {
  return in_scopes([&](Names& scope) -> std::vector<std::string>* {
    const auto found = scope.targets.find(name);
    return found == scope.targets.end() ? nullptr : &found->second;
  });
}

const Row* KernelBuild::keep(std::vector<Row> rows) {
  auto kept = std::make_shared<std::vector<Row>>(std::move(rows));
  program_.owned.push_back(kept);
  return kept->data();
}

int64_t* KernelBuild::keep(std::vector<int64_t> numbers) {
  auto kept = std::make_shared<std::vector<int64_t>>(std::move(numbers));
  program_.owned.push_back(kept);
  return kept->data();
}

const void* KernelBuild::keep(std::shared_ptr<void> more) {
  program_.owned.push_back(more);
  return more.get();
}

}  // namespace gpu
