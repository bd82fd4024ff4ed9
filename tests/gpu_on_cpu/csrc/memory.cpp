#include "memory.h"

#include <algorithm>
#include <cstdlib>

namespace gpu {
namespace {

constexpr bool within(uint64_t address, uint64_t first, uint64_t bytes) { return address - first < bytes; }

const char* proxy_of(bool async) { return async ? "asynchronous " : ""; }

}  // namespace

Access access_of(Warp& warp, const Instruction& at) {
  const Causality& causality = warp.block->machine->causality;
  const Strand strand = causality.strand(warp.number, StrandOf::warp);
  Access access;
  access.warp = &warp;
  access.pc = at.pc;
  access.strand = strand;
  access.clock = causality.now(strand);
  access.view = &warp.view;
  return access;
}

Memory::Area Memory::area_of(Region region) {
  Area area{std::move(region), nullptr, {}};
  if (area.region.writable && area.region.bytes != 0) {
    area.cells.reset(static_cast<Cell*>(std::calloc(area.region.bytes, sizeof(Cell))));
    if (!area.cells) throw std::bad_alloc();
  }
  return area;
}

Memory::Memory(std::vector<Region> regions) {
  for (Region& region : regions) globals_.push_back(area_of(std::move(region)));
  std::sort(globals_.begin(), globals_.end(),
            [](const Area& a, const Area& b) { return a.region.data < b.region.data; });
  params_.region.name = "the parameters";
  params_.region.writable = false;
  local_.region.name = "local memory";
}

void Memory::add_shared(Block& block) {
  if (block.slot >= shared_.size()) shared_.resize(block.slot + 1);
  shared_[block.slot] = std::make_unique<Area>(
      area_of({"shared memory", block.shared.data(), block.shared.size(), nullptr, true}));
  Area& area = *shared_[block.slot];
  area.written.resize(block.shared.size());
  area.region.written = area.written.data();
}

void Memory::end_shared(Block& block) {
  const auto first = reinterpret_cast<uint64_t>(block.shared.data());
  flags.forget(first, first + block.shared.size());
  shared_[block.slot].reset();
}

std::pair<Space, uint64_t> Memory::resolve(Space space, uint64_t address) {
  if (space != Space::generic) return {space, address};
  if (within(address, SHARED_WINDOW, WINDOW_BYTES)) return {Space::shared, address - SHARED_WINDOW};
  if (within(address, LOCAL_WINDOW, WINDOW_BYTES)) return {Space::local, address - LOCAL_WINDOW};
  if (within(address, PARAM_WINDOW, WINDOW_BYTES)) return {Space::param, address - PARAM_WINDOW};
  return {Space::global, address};
}

const Memory::Area& Memory::global(uint64_t address, uint32_t bytes, uint32_t lane) {
  const auto holds = [&](const Area& area) {
    const uint64_t first = reinterpret_cast<uint64_t>(area.region.data);
    return within(address, first, area.region.bytes) && address - first + bytes <= area.region.bytes;
  };
  if (last_ != nullptr && holds(*last_)) return *last_;
  auto after = std::upper_bound(globals_.begin(), globals_.end(), address, [](uint64_t at, const Area& area) {
    return at < reinterpret_cast<uint64_t>(area.region.data);
  });
  if (after != globals_.begin() && holds(after[-1])) return *(last_ = &after[-1]);
  std::string near = "no memory of the launch";
  uint64_t least = ~0ull;
  for (const Area& area : globals_) {
    const uint64_t first = reinterpret_cast<uint64_t>(area.region.data), end = first + area.region.bytes;
    const uint64_t distance =
        address < first ? first - address : address + bytes - std::min(end, address + bytes);
    if (distance >= least) continue;
    least = distance;
    near = address < first ? text_of(first - address, " bytes before ", area.region.name)
                           : text_of("byte ", address - first, " of ", area.region.name, ", which has ",
                                     area.region.bytes);
  }
  throw Fault{Kind::bounds, text_of(bytes, " bytes of global memory at ", near),
              lane < LANES ? static_cast<int>(lane) : -1};
}

Memory::Place Memory::place_of(const Access& by, Space space, uint64_t address, uint32_t bytes,
                               uint32_t lane) {
  std::tie(space, address) = resolve(space, address);
  const auto bounded = [&](const Area& area, std::byte* data, uint64_t size) {
    if (address + bytes <= size && address + bytes >= bytes) return data + address;
    throw Fault{Kind::bounds,
                text_of(bytes, " bytes at ", address, " of ", area.region.name, ", which has ", size),
                lane < LANES ? static_cast<int>(lane) : -1};
  };
  Block& block = *by.warp->block;
  if (space == Space::param) {
    std::vector<std::byte>& params = block.machine->launch.params;
    return {&params_, bounded(params_, params.data(), params.size()), nullptr, nullptr};
  }
  if (space == Space::local) {
    const uint32_t each = block.machine->kernel->local_bytes;
    std::byte* const data = by.warp->local.data() + size_t(lane % LANES) * each;
    return {&local_, bounded(local_, data, each), nullptr, nullptr};
  }
  const Area& area = space == Space::shared ? *shared_[block.slot] : global(address, bytes, lane);
  std::byte* const data = space == Space::shared ? bounded(area, area.region.data, area.region.bytes)
                                                 : reinterpret_cast<std::byte*>(address);
  const uint64_t offset = data - area.region.data;
  return {&area, data, area.region.written != nullptr ? area.region.written + offset : nullptr,
          area.cells != nullptr && by.tracked ? &area.cells[offset] : nullptr};
}

void Memory::fetch(const Access& by, const Place& place, uint32_t bytes, uint32_t lane, void* to) const {
  if (place.written != nullptr) {
    const void* missing = std::memchr(place.written, 0, bytes);
    if (missing != nullptr)
      fail_at(by, place, static_cast<const uint8_t*>(missing) - place.written, bytes, lane, nullptr);
  }
  std::memcpy(to, place.data, bytes);
}

void Memory::read(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane, void* to,
                  uint8_t* written) {
  const Place place = place_of(by, space, address, bytes, lane);
  if (written == nullptr) {
    fetch(by, place, bytes, lane, to);
  } else {
    std::memcpy(to, place.data, bytes);
    place.written != nullptr ? std::memcpy(written, place.written, bytes) : std::memset(written, 1, bytes);
  }
  if (place.cells == nullptr) return;
  shadow_.begin(by, lane);
  if (const Conflict conflict = shadow_.read(place.cells, bytes))
    fail_at(by, place, conflict.byte, bytes, lane, &conflict);
}

void Memory::write(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane,
                   const void* from, const uint8_t* written) {
  const Place place = place_of(by, space, address, bytes, lane);
  note(by, place, bytes, lane, from);
  if (place.written == nullptr) return;
  written != nullptr ? std::memcpy(place.written, written, bytes) : std::memset(place.written, 1, bytes);
}

// What is there becomes `value`, if the access may do that.
void Memory::note(const Access& by, const Place& place, uint32_t bytes, uint32_t lane, const void* value) {
  if (!place.area->region.writable)
    throw Fault{Kind::bounds, text_of("a write to ", place.area->region.name, ", which may only be read"),
                lane < LANES ? static_cast<int>(lane) : -1};
  const auto* bytes_of = static_cast<const std::byte*>(value);
  if (place.cells != nullptr) {
    if (!by.atomic && !flags.empty() && shadow_.last_was_atomic(*place.cells))
      flags.overwrite(reinterpret_cast<uint64_t>(place.data));
    shadow_.begin(by, lane);
    const Conflict conflict = by.atomic ? shadow_.change(place.cells, bytes)
                                        : shadow_.write(place.cells, bytes, place.data, bytes_of);
    if (conflict) fail_at(by, place, conflict.byte, bytes, lane, &conflict);
  }
  Block& block = *by.warp->block;
  if (place.area->region.data == block.shared.data())
    block.provenance.written(place.data - block.shared.data(), bytes);
  if (std::memcmp(place.data, value, bytes) == 0) return;
  std::memcpy(place.data, value, bytes);
  ++block.machine->events;
}

void Memory::fail_at(const Access& by, const Place& place, uint32_t byte, uint32_t bytes, uint32_t lane,
                     const Conflict* conflict) const {
  const Region& region = place.area->region;
  const std::string where = text_of("byte ", place.data - region.data + byte, " of ", region.name, " (", byte,
                                    " of an access of ", bytes, ")");
  const int by_lane = lane < LANES ? static_cast<int>(lane) : -1;
  if (conflict == nullptr) throw Fault{Kind::unwritten, text_of(where, " was never written"), by_lane};
  const Record& other = conflict->other;
  const uint32_t warps = by.warp->block->machine->causality.warps_a_block();
  const char* const missing = conflict->kind == Kind::proxy ? ": only a fence of the async proxy is missing"
                              : by.read_only || (other.flags & Record::READ_ONLY) != 0
                                  ? ": memory that ld.global.nc reads must not be written in the launch"
                                  : "";
  throw Fault{
      conflict->kind,
      text_of(where, ": an ", proxy_of(by.async_proxy), "access that nothing orders with an earlier ",
              proxy_of((other.flags & Record::ASYNC) != 0), conflict->with_write ? "write" : "read", missing),
      by_lane,
      other.pc,
      static_cast<int>(other.warp / warps),
      static_cast<int>(other.warp % warps)};
}

}  // namespace gpu
