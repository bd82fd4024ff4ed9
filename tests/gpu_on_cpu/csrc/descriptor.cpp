#include "descriptor.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace gpu {
namespace {

constexpr uint32_t CHUNK = 16;
constexpr uint32_t LINES = 8;        // of an atom
constexpr uint32_t K_CHUNKS = 2;     // 32 bytes
constexpr uint32_t MN_MAJOR_K = 16;  // of elements of 16 bits
constexpr uint32_t MOST_CHUNKS = 256 * K_CHUNKS;
constexpr uint32_t MOST_BYTES = 1u << 18;  // that a descriptor can address
constexpr uint64_t RESERVED = 0x3ff1'c000'c000'c000ull;
constexpr uint32_t NO_LANE = NONE & 0xff;

uint32_t field(uint64_t bits, uint32_t first, uint32_t count) {
  return static_cast<uint32_t>(bits >> first & ((1ull << count) - 1));
}

// Swaps chunks of a line by the line's number in the pattern, which repeats every 8 * span bytes.
uint32_t swizzled(const Descriptor& d, uint32_t address) {
  const uint32_t chunks = d.span / CHUNK;
  return address ^ (((address - d.base) >> 7 & (chunks - 1)) * CHUNK);
}

// Of chunk `chunk` (along K) of the line of element `line` of M or N.
uint32_t k_major_address(const Descriptor& d, uint32_t line, uint32_t chunk) {
  const uint32_t next = d.span == CHUNK ? d.leading : CHUNK;
  return swizzled(d, d.start + line / LINES * d.stride + line % LINES * d.span + chunk * next);
}

// Of chunk `chunk` (along M or N) of line `k`.
uint32_t mn_major_address(const Descriptor& d, uint32_t k, uint32_t chunk) {
  const uint32_t chunks = d.span / CHUNK;
  // Without a swizzle the offsets change their parts.
  const uint32_t along = chunks == 1 ? d.stride : d.leading, down = chunks == 1 ? d.leading : d.stride;
  return swizzled(
      d, d.start + chunk / chunks * along + chunk % chunks * CHUNK + k / LINES * down + k % LINES * d.span);
}

// Reads every byte once, in runs as long as bytes follow one another: that is much of the time of a wgmma.
void read_chunks(const Access& by, const Descriptor& d, const uint32_t* addresses, uint32_t count,
                 std::byte* to) {
  constexpr uint32_t CHUNKS_A_WORD = 64;
  std::byte staged[MOST_BYTES];
  uint64_t wanted[MOST_BYTES / CHUNK / CHUNKS_A_WORD];  // a bit for each chunk
  Memory& memory = *by.warp->block->machine->memory;
  const uint64_t bytes = by.warp->block->shared.size();
  const auto [least, most] = std::minmax_element(addresses, addresses + count);
  if (*most + CHUNK > bytes)
    fail(Kind::bounds, "an operand of wgmma at shared address ", *most, ", of ", bytes, " bytes");
  const uint32_t lowest = *least / CHUNK / CHUNKS_A_WORD, highest = *most / CHUNK / CHUNKS_A_WORD;
  std::fill(wanted + lowest, wanted + highest + 1, 0);
  for (uint32_t i = 0; i < count; ++i)
    wanted[addresses[i] / CHUNK / CHUNKS_A_WORD] |= 1ull << (addresses[i] / CHUNK % CHUNKS_A_WORD);
  for (uint32_t word = lowest; word <= highest; ++word) {
    for (uint64_t left = wanted[word]; left != 0;) {
      const uint32_t first = std::countr_zero(left), length = std::countr_one(left >> first);
      const uint32_t address = (word * CHUNKS_A_WORD + first) * CHUNK;
      memory.read(by, Space::shared, address, length * CHUNK, NO_LANE, staged + address);
      if (const uint32_t span = by.warp->block->provenance.other(address, length * CHUNK, d.span))
        fail(Kind::malformed, "a descriptor with a swizzle of ", d.span, " bytes of a tile at ", address,
             " that was copied with one of ", span);
      left &= length == CHUNKS_A_WORD ? 0 : ~(((1ull << length) - 1) << first);
    }
  }
  for (uint32_t i = 0; i < count; ++i) std::memcpy(to + i * CHUNK, staged + addresses[i], CHUNK);
}

}  // namespace

Tile read_descriptor(uint64_t bits, bool k_major, uint32_t extent, uint64_t shared_bytes) {
  constexpr uint32_t SPANS[] = {16, 128, 64, 32};
  const auto check = [bits](bool fits, const auto&... words) {
    if (!fits) fail(Kind::malformed, "descriptor 0x", std::hex, bits, ": ", words...);
  };
  Descriptor d;
  d.start = field(bits, 0, 14) * 16;
  d.leading = field(bits, 16, 14) * 16;
  d.stride = field(bits, 32, 14) * 16;
  d.base = field(bits, 49, 3) * 128;
  d.span = SPANS[field(bits, 62, 2)];
  check((bits & RESERVED) == 0, "bits that have to be zero are not");
  check(d.start < shared_bytes, "starts outside of shared memory");
  if (d.span == CHUNK) {
    check(d.base == 0, "a base offset without a swizzle");
    return {d, k_major, extent};
  }
  // It starts in the first line of an atom, and may start within that line.
  const uint32_t pattern = d.span * LINES, within = d.start % d.span;
  check((d.start - d.base) % pattern == within, "starts at 0x", d.start,
        ", where no pattern of a swizzle of ", std::dec, d.span, " bytes starts");
  const uint32_t line = k_major ? K_CHUNKS * CHUNK : std::min(extent * 2, d.span);
  check(within + line <= d.span, "leaves its line of ", std::dec, d.span, " bytes");
  return {d, k_major, extent};
}

void read_tile(const Access& by, const Tile& tile, uint32_t first, uint32_t count, std::byte* to) {
  uint32_t addresses[MOST_CHUNKS], chunks = 0;
  if (tile.k_major) {
    for (uint32_t line = first; line < first + count; ++line)
      for (uint32_t chunk = 0; chunk < K_CHUNKS; ++chunk)
        addresses[chunks++] = k_major_address(tile.at, line, chunk);
  } else {
    for (uint32_t k = 0; k < MN_MAJOR_K; ++k)
      for (uint32_t chunk = first / 8; chunk < (first + count) / 8; ++chunk)
        addresses[chunks++] = mn_major_address(tile.at, k, chunk);
  }
  read_chunks(by, tile.at, addresses, chunks, to);
}

}  // namespace gpu
