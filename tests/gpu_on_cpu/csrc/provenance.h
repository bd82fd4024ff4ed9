// Which swizzle tiles in shared memory have, where a tensor copy wrote them: a product that takes them with
// another one multiplies other elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gpu {

class Provenance {
 public:
  // A tensor copy wrote these bytes of shared memory, swizzled in lines of `span` bytes; 16: not swizzled.
  void copied(uint64_t address, uint64_t bytes, uint32_t span) {
    if (spans_.size() < end_of(address, bytes)) spans_.resize(end_of(address, bytes));
    fill(address, bytes, static_cast<uint8_t>(span));
  }
  // Another instruction did.
  void written(uint64_t address, uint64_t bytes) { fill(address, bytes, 0); }
  // What one of these bytes was copied with, where that is not `span`; 0 where there is none.
  uint32_t other(uint64_t address, uint64_t bytes, uint32_t span) const {
    for (uint64_t chunk = address / CHUNK; chunk < std::min(end_of(address, bytes), spans_.size()); ++chunk)
      if (spans_[chunk] != 0 && spans_[chunk] != span) return spans_[chunk];
    return 0;
  }

 private:
  static constexpr uint64_t CHUNK = 16;
  static uint64_t end_of(uint64_t address, uint64_t bytes) { return (address + bytes + CHUNK - 1) / CHUNK; }
  void fill(uint64_t address, uint64_t bytes, uint8_t span) {
    const uint64_t end = std::min(end_of(address, bytes), spans_.size());
    for (uint64_t chunk = address / CHUNK; chunk < end; ++chunk) spans_[chunk] = span;
  }

  std::vector<uint8_t> spans_;  // by chunk, as far as anything was copied; 0: not known
};

}  // namespace gpu
