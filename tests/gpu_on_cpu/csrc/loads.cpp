// Loads, stores, fences and what changes addresses.
#include <cstring>
#include <memory>
#include <string>

#include "access.h"

namespace gpu {
namespace {

constexpr Type TYPES[] = {{"b8", 1, false},    {"u8", 1, false},     {"s8", 1, true},    {"b16", 2, false},
                          {"u16", 2, false},   {"s16", 2, true},     {"f16", 2, false},  {"bf16", 2, false},
                          {"b32", 4, false},   {"u32", 4, false},    {"s32", 4, true},   {"f32", 4, false},
                          {"b64", 8, false},   {"u64", 8, false},    {"s64", 8, true},   {"f64", 8, false},
                          {"f16x2", 4, false}, {"bf16x2", 4, false}, {"b128", 16, false}};

// Caches change nothing that a kernel may rely on.
constexpr const char* HINTS[] = {"ca",
                                 "cg",
                                 "cs",
                                 "lu",
                                 "cv",
                                 "wb",
                                 "wt",
                                 "L1::evict_normal",
                                 "L1::evict_unchanged",
                                 "L1::evict_first",
                                 "L1::evict_last",
                                 "L1::no_allocate",
                                 "L2::evict_normal",
                                 "L2::evict_first",
                                 "L2::evict_last",
                                 "L2::64B",
                                 "L2::128B",
                                 "L2::256B"};

constexpr uint64_t POLICY = 0;  // what a cache policy is made of is nobody's business

Space space_of(const Statement& given) {
  if (given.has("global")) return Space::global;
  if (given.has("shared") || given.has("shared::cta") || given.has("shared::cluster")) return Space::shared;
  if (given.has("const")) return Space::constant;
  if (given.has("param") || given.has("param::entry")) return Space::param;
  return given.has("local") ? Space::local : Space::generic;
}

Scope scope_of(const Statement& given, Scope otherwise) {
  if (given.has("cta")) return Scope::cta;
  if (given.has("cluster")) return Scope::cluster;
  if (given.has("gpu")) return Scope::gpu;
  return given.has("sys") ? Scope::sys : otherwise;
}

const AccessForm& form_of(const Instruction& at) { return *static_cast<const AccessForm*>(at.more); }

template <class Stored, class Register>
Outcome load(Warp& warp, const Instruction& at) {
  const AccessForm& form = form_of(at);
  const Access by = access_of(warp, at, form);
  Memory& memory = *warp.block->machine->memory;
  const uint32_t bytes = form.bytes();
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint64_t address = aligned_address(warp, form.address, bytes, lane);
    Stored values[8];
    memory.read(by, form.space, address, bytes, lane, values);
    for (uint32_t i = 0; i < form.count; ++i)
      if (at.rows[i] != NONE) warp.row<Register>(at.rows[i])[lane] = static_cast<Register>(values[i]);
    if (by.atomic)
      memory.flags.load(warp, memory.host(by, form.space, address, bytes, lane), form.order, form.scope,
                        lane);
  });
  return by.atomic ? Outcome::polled : Outcome::next;
}

template <class Stored, class Register>
Outcome store(Warp& warp, const Instruction& at) {
  const AccessForm& form = form_of(at);
  const Access by = access_of(warp, at, form);
  Memory& memory = *warp.block->machine->memory;
  const uint32_t bytes = form.bytes();
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint64_t address = aligned_address(warp, form.address, bytes, lane);
    Stored values[8];
    for (uint32_t i = 0; i < form.count; ++i)
      values[i] = static_cast<Stored>(warp.row<Register>(at.rows[i])[lane]);
    memory.write(by, form.space, address, bytes, lane, values);
    if (by.atomic)
      memory.flags.store(warp, memory.host(by, form.space, address, bytes, lane), form.order, form.scope,
                         lane, false);
  });
  return Outcome::next;
}

// Steps by what is stored and by the register, which may be wider.
template <template <class, class> class Of, class Stored>
Step by_register(uint32_t width) {
  if (width < sizeof(Stored)) return nullptr;
  switch (width) {
    case 2:
      if constexpr (sizeof(Stored) <= 2) return Of<Stored, uint16_t>::step;
      break;
    case 4:
      if constexpr (sizeof(Stored) <= 4) return Of<Stored, uint32_t>::step;
      break;
    case 8:
      if constexpr (sizeof(Stored) <= 8) return Of<Stored, uint64_t>::step;
      break;
    case 16:
      if constexpr (sizeof(Stored) == 16) return Of<Stored, Stored>::step;
      break;
  }
  return nullptr;
}

template <template <class, class> class Of>
Step step_of(const Type& type, uint32_t width) {
  switch (type.bytes) {
    case 1:
      return type.is_signed ? by_register<Of, int8_t>(width) : by_register<Of, uint8_t>(width);
    case 2:
      return type.is_signed ? by_register<Of, int16_t>(width) : by_register<Of, uint16_t>(width);
    case 4:
      return type.is_signed ? by_register<Of, int32_t>(width) : by_register<Of, uint32_t>(width);
    case 8:
      return by_register<Of, uint64_t>(width);
    default:
      return by_register<Of, unsigned __int128>(width);
  }
}

template <class Stored, class Register>
struct Load {
  static constexpr Step step = load<Stored, Register>;
};
template <class Stored, class Register>
struct Store {
  static constexpr Step step = store<Stored, Register>;
};

// Registers of a value or a vector of them, all as wide as the first one.
bool value_rows(const Operand& operand, Build& build, const AccessForm& form, std::vector<Row>& rows,
                uint32_t* width) {
  const std::vector<Operand> single = {operand};
  const std::vector<Operand>& values = operand.is == Operand::Is::vector ? operand.parts : single;
  if (values.size() != form.count) return false;
  *width = std::max(form.type->bytes, 2u);
  for (const Operand& value : values)
    if (value.is == Operand::Is::reg) *width = build.width_of(value);
  for (const Operand& value : values) rows.push_back(build.row(value, *width));
  return true;
}

bool decode_access(const Statement& given, Build& build, Instruction& to) {
  AccessForm form;
  const bool loads = given.parts[0] == "ld";
  form.read_only = loads && given.has("nc");
  if (!read_form(given, form) || given.operands.size() != 2u + form.hinted) return false;
  if (form.order == (loads ? Order::release : Order::acquire) || form.order == Order::acquire_release)
    return false;
  const Operand &value = given.operands[loads ? 0 : 1], &address = given.operands[loads ? 1 : 0];
  std::vector<Row> rows;
  uint32_t width = 0;
  if (!value_rows(value, build, form, rows, &width)) return false;
  form.address = address_of(address, build);
  rows.push_back(form.address.row);
  finish(build, to, loads ? step_of<Load>(*form.type, width) : step_of<Store>(*form.type, width),
         loads ? form.count : 0, std::move(rows), {});
  to.more = build.keep(std::make_shared<AccessForm>(form));
  return to.step != nullptr;
}

// numbers: scope.
Outcome fence(Warp& warp, const Instruction& at) {
  warp.block->machine->memory->flags.fence(warp, static_cast<Scope>(at.numbers[0]), warp.active);
  return Outcome::next;
}

Outcome fence_of_async(Warp& warp, const Instruction&) {
  fence_async(warp, warp.active);
  return Outcome::next;
}

Outcome nothing(Warp&, const Instruction&) { return Outcome::next; }

bool decode_fence(const Statement& given, Build& build, Instruction& to) {
  if (!given.operands.empty()) return false;
  if (given.has("proxy")) {
    space_of(given);
    const bool async = given.has("async");
    if (!async && !given.has("alias")) return false;
    finish(build, to, async ? fence_of_async : nothing, 0, {}, {});
    return true;
  }
  Scope scope = scope_of(given, Scope::gpu);
  if (given.parts[0] == "membar") {
    if (given.parts.size() != 2) return false;
    if (!given.has("gl") && given.parts[1] != "cta" && given.parts[1] != "sys") return false;
  } else if (given.has("mbarrier_init")) {  // nothing but initialisations of mbarriers, within the cluster
    if (!given.has("release")) return false;
  } else if (!given.has("acq_rel") && !given.has("sc")) {
    return false;
  }
  finish(build, to, fence, 0, {}, {static_cast<int64_t>(scope)});
  return true;
}

// rows: result, address. numbers: what is added.
Outcome convert_address(Warp& warp, const Instruction& at) {
  const uint64_t added = static_cast<uint64_t>(at.numbers[0]);
  const uint64_t* from = warp.row<uint64_t>(at.rows[1]);
  uint64_t* to = warp.row<uint64_t>(at.rows[0]);
  for_lanes(warp.active, [&](uint32_t lane) { to[lane] = from[lane] + added; });
  return Outcome::next;
}

uint64_t window_of(Space space) {
  switch (space) {
    case Space::shared:
      return SHARED_WINDOW;
    case Space::local:
      return LOCAL_WINDOW;
    case Space::param:
      return PARAM_WINDOW;
    default:
      return 0;
  }
}

bool decode_cvta(const Statement& given, Build& build, Instruction& to) {
  const Space space = space_of(given);
  if (space == Space::generic || !given.has("u64") || given.operands.size() != 2) return false;
  const uint64_t window = window_of(space);
  const int64_t added = static_cast<int64_t>(given.has("to") ? -window : window);
  finish(build, to, convert_address, 1, rows_of(given, build, 8), {added});
  return true;
}

// rows: predicate, address. numbers: space, address is wide.
Outcome is_in_space(Warp& warp, const Instruction& at) {
  Mask found = 0;
  const auto wanted = static_cast<Space>(at.numbers[0]);
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint64_t address = warp.row<uint64_t>(at.rows[1])[lane];
    if (Memory::resolve(Space::generic, address).first == wanted) found |= Mask(1) << lane;
  });
  Mask& to = warp.mask(at.rows[0]);
  to = (to & ~warp.active) | found;
  return Outcome::next;
}

bool decode_isspacep(const Statement& given, Build& build, Instruction& to) {
  const Space space = space_of(given);
  if (space == Space::generic || space == Space::constant || given.operands.size() != 2) return false;
  finish(build, to, is_in_space, 1, {build.predicate(given.operands[0]), build.row(given.operands[1], 8)},
         {static_cast<int64_t>(space)});
  return true;
}

// rows: result, address, rank. A cluster has one block.
template <class Word>
Outcome map_address(Warp& warp, const Instruction& at) {
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint32_t rank = warp.row<uint32_t>(at.rows[2])[lane];
    if (rank != 0) throw Fault{Kind::bounds, text_of("block ", rank, " of a cluster of one"), int(lane)};
    warp.row<Word>(at.rows[0])[lane] = warp.row<Word>(at.rows[1])[lane];
  });
  return Outcome::next;
}

bool decode_mapa(const Statement& given, Build& build, Instruction& to) {
  const bool wide = given.has("u64");
  if (given.operands.size() != 3 || (!wide && !given.has("u32"))) return false;
  given.has("shared::cluster");
  const uint32_t width = wide ? 8 : 4;
  finish(build, to, wide ? map_address<uint64_t> : map_address<uint32_t>, 1,
         {build.row(given.operands[0], width), build.row(given.operands[1], width),
          build.row(given.operands[2], 4)},
         {});
  return true;
}

Outcome make_policy(Warp& warp, const Instruction& at) {
  for_lanes(warp.active, [&](uint32_t lane) { warp.row<uint64_t>(at.rows[0])[lane] = POLICY; });
  return Outcome::next;
}

bool decode_policy(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("fractional") || !given.has("b64") || given.operands.empty()) return false;
  for (const char* hint : HINTS) given.has(hint);
  finish(build, to, make_policy, 1, {build.row(given.operands[0], 8)}, {});
  return true;
}

bool decode_prefetch(const Statement& given, Build& build, Instruction& to) {
  space_of(given);
  for (const char* hint : HINTS) given.has(hint);
  given.has("tensormap");
  given.has("L1");
  given.has("L2");
  if (given.operands.size() != 1) return false;
  finish(build, to, nothing, 0, {address_of(given.operands[0], build).row}, {});
  return true;
}

}  // namespace

bool read_form(const Statement& given, AccessForm& form) {
  form.space = space_of(given);
  const bool is_volatile = given.has("volatile");
  form.scope = scope_of(given, is_volatile ? Scope::sys : Scope::gpu);
  if (is_volatile || given.has("relaxed")) form.order = Order::relaxed;
  if (given.has("acquire")) form.order = Order::acquire;
  if (given.has("release")) form.order = Order::release;
  if (given.has("acq_rel")) form.order = Order::acquire_release;
  given.has("weak");
  for (const char* hint : HINTS) given.has(hint);
  form.hinted = given.has("L2::cache_hint");
  for (const uint32_t count : {2, 4, 8})
    if (given.has(text_of('v', count))) form.count = count;
  for (const Type& type : TYPES)
    if (given.has(type.name)) form.type = &type;
  return form.type != nullptr;
}

Address address_of(const Operand& operand, Build& build) {
  Address address;
  address.row = build.address(operand, &address.offset);
  Operand base;
  base.is = Operand::Is::reg;
  base.name = operand.name;
  address.wide = !base.name.starts_with('%') || build.width_of(base) == 8;
  return address;
}

uint64_t aligned_address(const Warp& warp, const Address& address, uint32_t bytes, uint32_t lane) {
  const uint64_t found = address.of(warp, lane);
  if (found % bytes != 0)
    throw Fault{Kind::misaligned, text_of("address ", found, " is no multiple of ", bytes), int(lane)};
  return found;
}

Access access_of(Warp& warp, const Instruction& at, const AccessForm& form) {
  Access by = access_of(warp, at);
  by.atomic = form.order != Order::weak;
  by.element = static_cast<uint8_t>(form.type->bytes);
  by.scope = form.scope;
  by.read_only = form.read_only;
  return by;
}

void add_atomics(Decoders& decoders);

void add_memory(Decoders& decoders) {
  decoders["ld"] = decoders["st"] = decode_access;
  decoders["fence"] = decoders["membar"] = decode_fence;
  decoders["cvta"] = decode_cvta;
  decoders["isspacep"] = decode_isspacep;
  decoders["mapa"] = decode_mapa;
  decoders["createpolicy"] = decode_policy;
  decoders["prefetch"] = decoders["prefetchu"] = decode_prefetch;
  add_atomics(decoders);
}

}  // namespace gpu
