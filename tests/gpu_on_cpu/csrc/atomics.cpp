// Atomic operations: atom and red.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "access.h"
#include "formats.h"

namespace gpu {
namespace {

// Turns what is there into what will be, by an operand and, for cas, a second one.
using Change = void (*)(void* value, const void* operand, const void* second);

template <class T>
T loaded(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T, auto result>
void change(void* value, const void* operand, const void*) {
  const T after = result(loaded<T>(value), loaded<T>(operand));
  std::memcpy(value, &after, sizeof after);
}

template <class T>
void compare_and_swap(void* value, const void* compared, const void* swapped) {
  if (loaded<T>(value) == loaded<T>(compared)) std::memcpy(value, swapped, sizeof(T));
}

constexpr auto sum = [](auto a, auto b) { return static_cast<decltype(a)>(a + b); };
constexpr auto least = [](auto a, auto b) { return std::min(a, b); };
constexpr auto most = [](auto a, auto b) { return std::max(a, b); };
constexpr auto both = [](auto a, auto b) { return a & b; };
constexpr auto either = [](auto a, auto b) { return a | b; };
constexpr auto differing = [](auto a, auto b) { return a ^ b; };
constexpr auto replaced = [](auto, auto b) { return b; };
constexpr auto one_more = [](uint32_t a, uint32_t b) { return a >= b ? 0 : a + 1; };
constexpr auto one_less = [](uint32_t a, uint32_t b) { return a == 0 || a > b ? b : a - 1; };
constexpr auto flushed = [](float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
};
// In global memory subnormal floats count as zero.
constexpr auto flushed_sum = [](float a, float b) { return flushed(flushed(a) + flushed(b)); };

// A float has room enough for the sum: rounding it once more does no harm.
template <Format F, int count>
void add_narrow(void* value, const void* operand, const void*) {
  uint16_t sums[count], terms[count];
  std::memcpy(sums, value, sizeof sums);
  std::memcpy(terms, operand, sizeof terms);
  for (int i = 0; i < count; ++i)
    sums[i] = static_cast<uint16_t>(encode<F>(decode<F>(sums[i]) + decode<F>(terms[i]), Round::nearest));
  std::memcpy(value, sums, sizeof sums);
}

struct Operation {
  const char* name;
  const char* type;
  Change change;
};

using Pair = unsigned __int128;

constexpr Operation OPERATIONS[] = {
    {"add", "u32", change<uint32_t, sum>},       {"add", "s32", change<uint32_t, sum>},
    {"add", "u64", change<uint64_t, sum>},       {"add", "s64", change<uint64_t, sum>},
    {"add", "f32", change<float, sum>},          {"add", "f64", change<double, sum>},
    {"add", "f16", add_narrow<F16, 1>},          {"add", "bf16", add_narrow<BF16, 1>},
    {"add", "f16x2", add_narrow<F16, 2>},        {"add", "bf16x2", add_narrow<BF16, 2>},
    {"min", "u32", change<uint32_t, least>},     {"min", "s32", change<int32_t, least>},
    {"min", "u64", change<uint64_t, least>},     {"min", "s64", change<int64_t, least>},
    {"max", "u32", change<uint32_t, most>},      {"max", "s32", change<int32_t, most>},
    {"max", "u64", change<uint64_t, most>},      {"max", "s64", change<int64_t, most>},
    {"and", "b32", change<uint32_t, both>},      {"and", "b64", change<uint64_t, both>},
    {"or", "b32", change<uint32_t, either>},     {"or", "b64", change<uint64_t, either>},
    {"xor", "b32", change<uint32_t, differing>}, {"xor", "b64", change<uint64_t, differing>},
    {"exch", "b32", change<uint32_t, replaced>}, {"exch", "b64", change<uint64_t, replaced>},
    {"exch", "b128", change<Pair, replaced>},    {"inc", "u32", change<uint32_t, one_more>},
    {"dec", "u32", change<uint32_t, one_less>},  {"cas", "b16", compare_and_swap<uint16_t>},
    {"cas", "b32", compare_and_swap<uint32_t>},  {"cas", "b64", compare_and_swap<uint64_t>},
    {"cas", "b128", compare_and_swap<Pair>},
};

struct Plan {
  AccessForm form;
  Change change, in_global;
  uint32_t results = 0;  // rows of them, then of the operands and the second operands
  bool two = false;
};

// One element of a vector, each of which is atomic by itself.
void change_element(Warp& warp, const Instruction& at, const Plan& plan, const Access& by, uint32_t i,
                    uint32_t lane) {
  const AccessForm& form = plan.form;
  const uint32_t bytes = form.type->bytes;
  const auto [space, address] =
      Memory::resolve(form.space, aligned_address(warp, form.address, form.bytes(), lane) + i * bytes);
  const auto value_of = [&](uint32_t row) { return warp.frame + at.rows[row] + lane * bytes; };
  const std::byte* const operand = value_of(plan.results + i);
  const std::byte* const second = plan.two ? value_of(plan.results + form.count + i) : nullptr;
  const Change change = space == Space::global ? plan.in_global : plan.change;
  std::byte before[16];
  Memory& memory = *warp.block->machine->memory;
  memory.change(by, space, address, bytes, lane, [&](void* value) {
    std::memcpy(before, value, bytes);
    change(value, operand, second);
  });
  if (plan.results != 0 && at.rows[i] != NONE) std::memcpy(value_of(i), before, bytes);
  const uint64_t location = memory.host(by, space, address, bytes, lane);
  memory.flags.load(warp, location, form.order, form.scope, lane);
  memory.flags.store(warp, location, form.order, form.scope, lane, true);
}

Outcome change_all(Warp& warp, const Instruction& at) {
  const Plan& plan = *static_cast<const Plan*>(at.more);
  const Access by = access_of(warp, at, plan.form);
  for_lanes(warp.active, [&](uint32_t lane) {
    for (uint32_t i = 0; i < plan.form.count; ++i) change_element(warp, at, plan, by, i, lane);
  });
  return plan.results != 0 ? Outcome::polled : Outcome::next;
}

bool find_operation(const Statement& given, Plan& plan) {
  plan.change = nullptr;
  for (const Operation& operation : OPERATIONS)
    if (std::string_view(operation.type) == plan.form.type->name && given.has(operation.name))
      plan.change = operation.change;
  plan.in_global = plan.change == change<float, sum> ? change<float, flushed_sum> : plan.change;
  return plan.change != nullptr;
}

bool decode_atomic(const Statement& given, Build& build, Instruction& to) {
  Plan plan;
  AccessForm& form = plan.form;
  if (!read_form(given, form) || !find_operation(given, plan)) return false;
  if (form.order == Order::weak) form.order = Order::relaxed;
  given.has("noftz");
  const size_t results = given.parts[0] == "atom";
  plan.two = given.has("cas");
  if (given.operands.size() != results + 2 + plan.two + form.hinted) return false;
  plan.results = results != 0 ? form.count : 0;
  form.address = address_of(given.operands[results], build);
  std::vector<Row> rows;
  for (size_t i = 0; i < results + 2 + plan.two; ++i) {
    const Operand& operand = given.operands[i];
    if (i == results) continue;
    const std::vector<Operand> single = {operand};
    const std::vector<Operand>& values = operand.is == Operand::Is::vector ? operand.parts : single;
    if (values.size() != form.count) return false;
    for (const Operand& value : values) rows.push_back(build.row(value, form.type->bytes));
  }
  rows.push_back(form.address.row);
  finish(build, to, change_all, plan.results, std::move(rows), {});
  to.more = build.keep(std::make_shared<Plan>(plan));
  return true;
}

}  // namespace

void add_atomics(Decoders& decoders) { decoders["atom"] = decoders["red"] = decode_atomic; }

}  // namespace gpu
