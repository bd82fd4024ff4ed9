// Splits a scan over threads: by sequence, by range of lanes and, where those are too few, by chunk of time.
// Every lane sees the same arithmetic in the same order whatever the split: the bits depend on the operands
// alone.
//
// Chunks of time are guessed, then proved. All run at once, each but the first from a state of zero, and
// record the state after every block of kScanBlock steps. Then, in order, each chunk is rerun from the final
// state of its left neighbour, block by block, until the state after a block has the recorded bits:
// everything after it is correct already. Gates of modulus below 1 forget the initial state, so this takes
// few blocks; gates that forget nothing cost as much as one thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "scan/scan.h"

namespace resformer::scan_host {

constexpr int64_t kLeastLanes = 128, kMostLanes = 1024;  // of a range, in floats
constexpr int64_t kLeastChunk = 16;                      // blocks of a chunk of time
constexpr int64_t kLaneStep = 32;  // whole cache lines of 16-bit numbers; a multiple of kScanPad

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sequences of a call: batch entries of one length, or segments of packed rows.
struct ScanSequences {
  int64_t count, length;
  const int32_t* starts;  // packed: count + 1 offsets, checked; else null
  bool reverse;

  int64_t first_row(int64_t s) const { return starts ? starts[s] : 0; }
  int64_t steps(int64_t s) const { return starts ? starts[s + 1] - starts[s] : length; }
  int64_t blocks(int64_t s) const { return ceil_div(steps(s), kScanBlock); }

  // One block in the order of the scan, or in the opposite one.
  ScanPiece piece(int64_t s, int64_t block, bool against) const {
    const int64_t begin = block * kScanBlock, end = std::min(begin + kScanBlock, steps(s));
    const int64_t step = against ? end - 1 : begin;
    const int64_t row = first_row(s) + (reverse ? steps(s) - 1 - step : step);
    return {starts ? 0 : s, row, reverse != against ? -1 : 1, end - begin};
  }
};

// Adjacent sequences that one thread serves together: one long sequence, or short ones of about a block.
// `slot`: index of its first block over all runs; short sequences share one.
struct ScanRun {
  int64_t first, last, slot;

  bool alone() const { return last - first == 1; }
};

inline std::vector<ScanRun> runs_of(const ScanSequences& sequences) {
  std::vector<ScanRun> runs;
  int64_t slot = 0, s = 0;
  while (s < sequences.count) {
    int64_t last = s + 1, steps = sequences.steps(s);
    while (last < sequences.count && steps + sequences.steps(last) <= kScanBlock)
      steps += sequences.steps(last++);
    runs.push_back({s, last, slot});
    slot += last - s == 1 ? std::max<int64_t>(1, sequences.blocks(s)) : 1;
    s = last;
  }
  return runs;
}

inline int64_t slots_of(const ScanSequences& sequences, const std::vector<ScanRun>& runs) {
  if (runs.empty()) return 0;
  const ScanRun& last = runs.back();
  return last.slot + (last.alone() ? std::max<int64_t>(1, sequences.blocks(last.first)) : 1);
}

// Lanes of a range: as many as allowed, in enough ranges to keep all threads busy.
inline int64_t lanes_of_range(int64_t width, int64_t runs, int64_t threads) {
  const int64_t most = std::max<int64_t>(1, width / kLeastLanes);
  int64_t count = std::max<int64_t>(1, ceil_div(width, kMostLanes));
  while (count < most && runs * count % threads != 0 && runs * count < 4 * threads) ++count;
  return std::max(kLaneStep, ceil_div(ceil_div(width, count), kLaneStep) * kLaneStep);
}

// `Scan` has `against` (whether it runs opposite to the sequences' order), enter(s, begin, end, carry),
// step(run, s, block, begin, end, carry) and leave(s, begin, end, carry) for lanes [begin, end).
template <class Scan>
class ScanWalk {
 public:
  ScanWalk(const ScanSequences& sequences, const std::vector<ScanRun>& runs, int64_t width, const Scan& scan)
      : sequences_(sequences), runs_(runs), width_(width), scan_(scan) {
    const int64_t threads = torch::stable::get_num_threads();
    range_ = lanes_of_range(width, static_cast<int64_t>(runs.size()), threads);
    ranges_ = ceil_div(width, range_);
    units_ = static_cast<int64_t>(runs.size()) * ranges_;
    chunks_ = units_ < threads ? ceil_div(threads, std::max<int64_t>(1, units_)) : 1;
  }

  void run() {
    if (chunks_ > 1) return run_in_chunks();
    parallel_units(
        units_, [&] { return Scratch(range_ + kScanPad); },
        [&](int64_t unit, Scratch& carry) { whole(unit, carry.get()); });
  }

 private:
  struct Chunk {
    int64_t unit, begin, end;  // blocks in visiting order
  };

  const ScanRun& run_of(int64_t unit) const { return runs_[unit / ranges_]; }
  int64_t begin_of(int64_t unit) const { return unit % ranges_ * range_; }
  int64_t end_of(int64_t unit) const { return std::min(begin_of(unit) + range_, width_); }

  // Block number `visit` of sequence s, in visiting order.
  void step(int64_t unit, int64_t s, int64_t visit, float* carry) const {
    const int64_t block = scan_.against ? sequences_.blocks(s) - 1 - visit : visit;
    scan_.step(run_of(unit), s, block, begin_of(unit), end_of(unit), carry);
  }

  void enter(int64_t unit, int64_t s, float* carry) const {
    std::fill_n(carry, range_ + kScanPad, 0.0f);
    scan_.enter(s, begin_of(unit), end_of(unit), carry);
  }

  void whole(int64_t unit, float* carry) const {
    for (int64_t s = run_of(unit).first; s < run_of(unit).last; ++s) {
      enter(unit, s, carry);
      for (int64_t visit = 0; visit < sequences_.blocks(s); ++visit) step(unit, s, visit, carry);
      scan_.leave(s, begin_of(unit), end_of(unit), carry);
    }
  }

  std::vector<Chunk> split_time() const {
    std::vector<Chunk> chunks;
    for (int64_t unit = 0; unit < units_; ++unit) {
      const ScanRun& run = run_of(unit);
      const int64_t blocks = run.alone() ? sequences_.blocks(run.first) : 0;
      const int64_t size = std::max(kLeastChunk, ceil_div(blocks, chunks_));
      if (blocks < 2 * kLeastChunk) {
        chunks.push_back({unit, 0, blocks});
        continue;
      }
      for (int64_t begin = 0; begin < blocks; begin += size)
        chunks.push_back({unit, begin, std::min(begin + size, blocks)});
    }
    return chunks;
  }

  void run_in_chunks() {
    const std::vector<Chunk> chunks = split_time();
    // The state after each block of each unit that has several chunks.
    std::vector<std::vector<float>> recorded(units_);
    for (const Chunk& chunk : chunks)
      if (chunk.begin > 0) recorded[chunk.unit].resize(sequences_.blocks(run_of(chunk.unit).first) * range_);
    parallel_units(
        static_cast<int64_t>(chunks.size()), [&] { return Scratch(range_ + kScanPad); },
        [&](int64_t i, Scratch& carry) { guess(chunks[i], recorded[chunks[i].unit], carry.get()); });
    parallel_units(
        units_, [&] { return Scratch(range_ + kScanPad); },
        [&](int64_t unit, Scratch& carry) { prove(unit, chunks, recorded[unit], carry.get()); });
  }

  void guess(const Chunk& chunk, std::vector<float>& recorded, float* carry) const {
    if (recorded.empty()) return whole(chunk.unit, carry);
    const int64_t s = run_of(chunk.unit).first;
    if (chunk.begin == 0) {
      enter(chunk.unit, s, carry);
    } else {
      std::fill_n(carry, range_ + kScanPad, 0.0f);
    }
    for (int64_t visit = chunk.begin; visit < chunk.end; ++visit) {
      step(chunk.unit, s, visit, carry);
      std::memcpy(recorded.data() + visit * range_, carry, bytes());
    }
  }

  void prove(int64_t unit, const std::vector<Chunk>& chunks, std::vector<float>& recorded,
             float* carry) const {
    if (recorded.empty()) return;
    const int64_t s = run_of(unit).first;
    std::fill_n(carry, range_ + kScanPad, 0.0f);
    for (const Chunk& chunk : chunks) {
      if (chunk.unit != unit || chunk.begin == 0) continue;
      std::memcpy(carry, recorded.data() + (chunk.begin - 1) * range_, bytes());
      for (int64_t visit = chunk.begin; visit < chunk.end; ++visit) {
        step(unit, s, visit, carry);
        float* after = recorded.data() + visit * range_;
        if (std::memcmp(after, carry, bytes()) == 0) break;
        std::memcpy(after, carry, bytes());
      }
    }
    std::memcpy(carry, recorded.data() + (sequences_.blocks(s) - 1) * range_, bytes());
    scan_.leave(s, begin_of(unit), end_of(unit), carry);
  }

  size_t bytes() const { return range_ * sizeof(float); }

  const ScanSequences& sequences_;
  const std::vector<ScanRun>& runs_;
  int64_t width_;
  const Scan& scan_;
  int64_t range_, ranges_, units_, chunks_;
};

}  // namespace resformer::scan_host
