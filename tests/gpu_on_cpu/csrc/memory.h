// Memory of a launch: what is where, who wrote it, and in what order.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "causality.h"
#include "fault.h"
#include "flags.h"
#include "machine.h"
#include "shadow.h"

namespace gpu {

enum class Space : uint8_t { generic, global, shared, constant, param, local };

// Generic addresses of shared, local and param memory start here; global ones are the host's own.
constexpr uint64_t SHARED_WINDOW = 0x7f00'0000'0000'0000ull;
constexpr uint64_t LOCAL_WINDOW = 0x7e00'0000'0000'0000ull;
constexpr uint64_t PARAM_WINDOW = 0x7d00'0000'0000'0000ull;
constexpr uint64_t WINDOW_BYTES = 1ull << 32;

// One access as the checks see it.
struct Access {
  Warp* warp = nullptr;  // whose instruction it is, also of an operation performed later
  uint32_t pc = 0;       // of that instruction
  Strand strand = 0;     // of the warp, or of the operation
  Clock clock = 0;
  // What the accessor has seen: the warp's view, or the operation's when it was issued.
  const View* view = nullptr;
  bool async_proxy = false;  // bulk copies and wgmma
  bool fenced = false;       // the async proxy sees its writes without a fence: those of cp.async
  bool atomic = false;       // relaxed or stronger at `scope`: no race with other atomic accesses in scope
  Scope scope = Scope::gpu;
  uint8_t element = 0;     // bytes of what is read or written at once, where it is atomic
  bool tracked = true;     // false: neither checked for races nor noted (mbarrier objects)
  bool read_only = false;  // ld.global.nc: nobody may write it in the whole launch
};

struct Region {  // global memory of a launch: a tensor's storage, or a variable of the module
  std::string name;
  std::byte* data = nullptr;
  uint64_t bytes = 0;
  uint8_t* written = nullptr;  // a byte for each: whether somebody wrote it; nullptr: all of it
  bool writable = true;
};

class Memory {
 public:
  explicit Memory(std::vector<Region> regions);

  // Bytes of one lane at an address of a space. `lane` is NONE's low byte where an operation has no lane.
  // Faults: bounds, unwritten, race, proxy. `to` and `from` are of the host. With `written`, bytes that
  // nobody wrote may be read, and are told or kept as such.
  void read(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane, void* to,
            uint8_t* written = nullptr);
  void write(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane, const void* from,
             const uint8_t* written = nullptr);
  // An atomic read and write of at most 16 bytes: change(bytes) turns what is there into what will be.
  template <class Change>
  void change(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane,
              Change&& change) {
    const Place place = place_of(by, space, address, bytes, lane);
    std::byte value[16];
    fetch(by, place, bytes, lane, value);
    change(value);
    note(by, place, bytes, lane, value);
  }

  // Space and address within it of a generic address; the same again for others.
  static std::pair<Space, uint64_t> resolve(Space space, uint64_t address);
  // The host's address of a byte, as flags are known by.
  uint64_t host(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane) {
    return reinterpret_cast<uint64_t>(place_of(by, space, address, bytes, lane).data);
  }

  // A block's shared memory, from its start to its end.
  void add_shared(Block& block);
  void end_shared(Block& block);

  Flags flags;

 private:
  struct Freed {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Area {
    Region region;
    std::unique_ptr<Cell[], Freed> cells;  // pages that nobody touches cost nothing
    std::vector<uint8_t> written;          // of shared memory
  };
  struct Place {
    const Area* area;
    std::byte* data;
    uint8_t* written;
    Cell* cells;  // nullptr: not tracked
  };
  static Area area_of(Region region);
  Place place_of(const Access& by, Space space, uint64_t address, uint32_t bytes, uint32_t lane);
  const Area& global(uint64_t address, uint32_t bytes, uint32_t lane);
  void fetch(const Access& by, const Place& place, uint32_t bytes, uint32_t lane, void* to) const;
  void note(const Access& by, const Place& place, uint32_t bytes, uint32_t lane, const void* value);
  // Of byte `byte` of an access: a conflict, or nobody wrote it.
  [[noreturn]] void fail_at(const Access& by, const Place& place, uint32_t byte, uint32_t bytes,
                            uint32_t lane, const Conflict* conflict) const;

  std::vector<Area> globals_;  // by address
  Area params_, local_;
  std::vector<std::unique_ptr<Area>> shared_;  // by the block's slot
  const Area* last_ = nullptr;                 // that was asked for
  Shadow shadow_;
};

// The access of a warp's own instruction at this moment.
Access access_of(Warp& warp, const Instruction& at);

}  // namespace gpu
