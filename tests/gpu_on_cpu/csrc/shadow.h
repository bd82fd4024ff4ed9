// Who touched each byte last, and whether an access is ordered after that.
//
// Every byte has a cell of two numbers: its last write, and the reads since then as a set. Neighbouring bytes
// mostly have equal cells: what to do about one is decided once for all of them, and remembered for the next
// ones.
#pragma once

#include <cstdint>
#include <vector>

#include "causality.h"
#include "fault.h"

namespace gpu {

struct Access;

// An access that was made: those of one instruction in one stretch of a strand share one.
struct Record {
  enum : uint8_t { ATOMIC = 1, BLOCK_SCOPE = 2, ASYNC = 4, READ_ONLY = 8, SIZE = 0x70 };
  static constexpr uint32_t SIZE_AT = 4;  // of an atomic access, as a power of two
  Strand strand;
  Clock clock;
  uint32_t warp;  // whose instruction it was
  uint32_t pc : 24;
  uint32_t flags : 8;

  bool operator==(const Record&) const = default;
};

struct Cell {
  uint32_t write = 0;  // record << 5 | lane; record 0 is nobody's
  uint32_t reads = 0;  // set << 6 | lane of the last read, or SEVERAL

  bool operator==(const Cell&) const = default;
};

// What an access is not ordered with.
struct Conflict {
  bool found = false;
  Kind kind = Kind::race;
  bool with_write = false;
  uint32_t byte = 0;  // of the access, the first one
  Record other{};
  explicit operator bool() const { return found; }
};

class Shadow {
 public:
  Shadow();

  // The access that the calls from here on belong to.
  void begin(const Access& by, uint32_t lane);
  Conflict read(Cell* cells, uint32_t count);
  // Bytes that are written as they were conflict with no other write.
  Conflict write(Cell* cells, uint32_t count, const std::byte* before, const std::byte* after);
  // A relaxed or stronger write, or an atomic read and write.
  Conflict change(Cell* cells, uint32_t count);
  bool last_was_atomic(Cell cell) const {
    return (records_[cell.write >> LANE_BITS].flags & Record::ATOMIC) != 0;
  }

 private:
  static constexpr uint32_t LANE_BITS = 5, READER_BITS = 6;
  static constexpr uint32_t SEVERAL = 32, SOME = 33;  // lanes of a read; one that is no longer known
  static constexpr uint32_t RECENT = 1 << 12, STEPS = 1 << 13;

  // A set of reads is the last one and the set of those before it. Reads that are ordered before a later one
  // are left out where that is cheap: whoever is ordered after the later one is ordered after them.
  struct Node {
    uint32_t before = 0;
    uint32_t record = 0;
    uint32_t size = 0;           // of the set
    uint32_t limit : 29 = 128;   // size at which it is gone through
    uint32_t several : 1 = 0;    // lanes
    uint32_t wrote : 1 = 0;      // an atomic write that another one followed
    uint32_t any_wrote : 1 = 0;  // in the set
  };
  // What a set becomes by an access.
  struct Step {
    uint32_t set = 0, record = 0, extra = 0;  // extra: how lanes relate; or the write that was there
    uint32_t to = 0;
    bool several = false;
  };

  bool ordered(const Record& other, uint32_t lane, bool wrote) const;
  bool ordered_all(const Record& other, bool wrote) const;  // whichever lane it was
  bool both_atomic(const Record& other) const;
  bool after_write(uint32_t write);
  bool after_reads(uint32_t reads, bool only_writes);
  bool refuse(const Record& other, uint32_t lane, bool wrote);
  uint32_t with_read(uint32_t reads);
  uint32_t with_change(Cell cell);
  Step& step_of(uint32_t set, uint32_t extra);
  bool droppable(const Node& node, bool by_change) const;
  uint32_t keep_several(uint32_t set, uint32_t lane);
  uint32_t push(uint32_t before, uint32_t record, bool several, bool wrote);
  uint32_t compact(uint32_t set);

  std::vector<Record> records_;
  std::vector<uint32_t> recent_;  // records by a hash, to find one again
  std::vector<Node> nodes_;
  std::vector<Step> steps_;

  const Access* by_ = nullptr;
  uint32_t lane_ = 0;
  Record made_{};                             // the record of the access
  uint32_t index_ = 0;                        // and its number
  bool is_warp_ = false;                      // a warp's own access, not an operation's
  uint32_t good_write_ = 0, good_reads_ = 0;  // record and set that the access is ordered after, in all lanes
  Conflict conflict_;
};

}  // namespace gpu
