// Decodes the opcodes that tables describe.
#include "arithmetic.h"

#include "fault.h"

namespace gpu {
namespace {

const Forms& forms() {
  static const Forms all = [] {
    Forms made;
    define_integers(made);
    define_reals(made);
    define_selections(made);
    return made;
  }();
  return all;
}

struct Named {
  Modifier modifier;
  Round round = Round::nearest;
  bool integral = false;
};

const Named* modifier_of(const std::string& part) {
  static const std::unordered_map<std::string, Named> names = {
      {"ftz", {FTZ}},
      {"sat", {SAT}},
      {"relu", {RELU}},
      {"satfinite", {FINITE}},
      {"approx", {APPROXIMATE}},
      {"full", {APPROXIMATE}},
      {"rn", {NEAREST}},
      {"rna", {AWAY, Round::away}},
      {"rz", {DIRECTED, Round::zero}},
      {"rm", {DIRECTED, Round::down}},
      {"rp", {DIRECTED, Round::up}},
      {"rni", {NEAREST, Round::nearest, true}},
      {"rzi", {DIRECTED, Round::zero, true}},
      {"rmi", {DIRECTED, Round::down, true}},
      {"rpi", {DIRECTED, Round::up, true}},
  };
  const auto found = names.find(part);
  return found == names.end() ? nullptr : &found->second;
}

// The opcode itself, or what is left of it without modifiers.
const Form* find_form(const Statement& given) {
  const auto whole = forms().find(given.opcode);
  if (whole != forms().end()) return &whole->second;
  std::string left;
  for (const std::string& part : given.parts) {
    if (modifier_of(part) == nullptr) left += (left.empty() ? "" : ".") + part;
  }
  const auto found = forms().find(left);
  return found == forms().end() ? nullptr : &found->second;
}

bool decode_form(const Statement& given, Build& build, Instruction& to) {
  const Form* form = find_form(given);
  if (form == nullptr || given.operands.size() != form->widths.size()) return false;
  const bool whole = forms().contains(given.opcode);
  const Modifiers modifiers = whole ? Modifiers{} : read_modifiers(given);
  if ((modifiers.given & ~form->modifiers) != 0 || modifiers.integral) return false;
  given.understood.assign(given.parts.size(), true);
  std::vector<Row> rows;
  for (size_t i = 0; i < form->widths.size(); ++i) {
    const Operand& operand = given.operands[i];
    const uint32_t width = form->widths[i];
    if (operand.negated || (i == 0 && operand.is != Operand::Is::reg)) return false;
    if (i != 0 && !takes_constant(given.parts.back(), operand)) return false;
    rows.push_back(width == 0 ? build.predicate(operand) : build.row(operand, width));
  }
  finish(build, to, form->step, 1, std::move(rows), {modifiers.given, static_cast<int64_t>(modifiers.round)});
  return true;
}

}  // namespace

Modifiers read_modifiers(const Statement& given) {
  Modifiers found;
  for (const std::string& part : given.parts) {
    const Named* named = modifier_of(part);
    if (named == nullptr) continue;
    given.has(part);
    found.given |= named->modifier;
    found.integral |= named->integral;
    if ((named->modifier & ROUNDS) != 0) found.round = named->round;
  }
  return found;
}

bool takes_constant(const std::string& type, const Operand& operand) {
  const bool real = type == "f32" || type == "f64", whole = type[0] == 's' || type[0] == 'u';
  return !(real && operand.is == Operand::Is::number) && !(whole && operand.is == Operand::Is::real);
}

void add_arithmetic(Decoders& decoders) {
  for (const auto& [opcode, form] : forms()) decoders[opcode.substr(0, opcode.find('.'))] = decode_form;
  add_conversions(decoders);
  add_comparisons(decoders);
  add_moves(decoders);
}

}  // namespace gpu
