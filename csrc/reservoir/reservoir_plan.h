// Chunks of time, and sweeps over them until every chunk starts from its left neighbour's end.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "reservoir/reservoir.h"

namespace resformer::reservoir_host {

enum class Mode : int64_t { automatic = 0, sequential = 1, chunked = 2 };

constexpr int64_t kShortest = 16;     // steps of a chunk that was asked for
constexpr int64_t kWorthwhile = 256;  // steps of a chunk that "auto" makes
// Enough rows for a matrix product, and no more: each has to forget its own guess.
constexpr int64_t kChunks = 12;
// Shares of the tolerance: within which a start is accepted, and trajectories meet. Less than 1, for a
// remaining difference may grow for a while before it goes.
constexpr float kAccepted = 0.5f, kMeeting = 0.125f;
// A reservoir that forgets brings trajectories nearer at nearly every comparison. Where they part again by
// this factor, a difference within the tolerance could leave it.
constexpr float kRegrown = 3.0f;
constexpr int64_t kCacheBytes = 3 << 18;  // weights up to this size fit in each thread's cache
constexpr int64_t kWorkPerPart = 32768;   // multiply-adds of a step that pay for another thread

struct Sequence {
  int64_t offset, length;  // steps
};

// A piece of one sequence; `begin` counts steps in the order of the recurrence.
struct Chunk {
  int64_t sequence, begin, length;
};

// The split depends on lengths alone: results do not depend on the number of threads.
inline std::vector<Chunk> chunks_of(const std::vector<Sequence>& sequences, Mode mode, bool pays) {
  int64_t total = 0, longest = 0;
  for (const Sequence& s : sequences) {
    total += s.length;
    longest = std::max(longest, s.length);
  }
  const int64_t fair = (total + kChunks - 1) / kChunks;
  int64_t length = longest;
  if (mode == Mode::chunked) length = std::max(kShortest, fair);
  if (mode == Mode::automatic && pays && longest >= 2 * kWorthwhile) length = std::max(kWorthwhile, fair);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const int64_t steps = sequences[i].length;
    // Equal chunks, not a short one last.
    const int64_t count = steps == 0 ? 0 : (steps + length - 1) / length;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t begin = steps * c / count;
      chunks.push_back({static_cast<int64_t>(i), begin, steps * (c + 1) / count - begin});
    }
  }
  return chunks;
}

// Tensors as rows of steps: element strides; `reverse` runs back in time.
struct Streams {
  std::vector<Sequence> sequences;
  const float* inputs;
  const float* gain;  // adjoint, else null; shaped as states
  float* states;
  std::vector<int64_t> inputs_at, states_at;  // first step of each sequence
  int64_t input_stride, state_stride;
  bool reverse;
};

struct Report {
  int64_t chunks = 0, sweeps = 0, work = 0, steps = 0;
  double mismatch = 0.0;
  bool forgot = true;
};

class Sweeper {
 public:
  Sweeper(const ReservoirKernels& kernels, ReservoirStep step, const Streams& streams,
          std::vector<Chunk> chunks, float tolerance, int64_t work_per_step, int64_t weight_bytes)
      : kernels_(kernels),
        step_(step),
        streams_(streams),
        chunks_(std::move(chunks)),
        tolerance_(tolerance),
        work_per_step_(work_per_step),
        weight_bytes_(weight_bytes),
        width_(step.layout.width()),
        slots_(step.adjoint ? 4 : 2),
        buffer_(std::max<int64_t>(1, count() * (slots_ + 2) * width_)),
        met_(chunks_.size(), false),
        exact_(chunks_.size(), false) {
    step_.tolerance = tolerance * kMeeting;
    step_.input_step = streams.reverse ? -streams.input_stride : streams.input_stride;
    step_.state_step = streams.reverse ? -streams.state_stride : streams.state_stride;
    std::memset(buffer_.get(), 0, sizeof(float) * count() * (slots_ + 2) * width_);
  }

  int64_t count() const { return static_cast<int64_t>(chunks_.size()); }
  float* start(int64_t chunk) { return buffer_.get() + chunk * (slots_ + 2) * width_; }
  float* end(int64_t chunk) { return start(chunk) + width_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  bool is_first(int64_t chunk) const { return chunks_[chunk].begin == 0; }

  // The caller sets the start of each sequence's first chunk; the others start from the guess zero.
  Report run() {
    Report report;
    report.chunks = count();
    for (const Chunk& chunk : chunks_) report.steps += chunk.length;
    std::vector<int64_t> todo(chunks_.size());
    for (int64_t i = 0; i < count(); ++i) todo[i] = i;
    if (todo.empty()) return report;
    double before = std::numeric_limits<double>::infinity();
    for (bool first = true; !todo.empty(); first = false) {
      const float growth = sweep(todo, !first, &report);
      if (report.forgot) {
        double apart = 0.0;
        todo = disagreeing(&apart, &report.mismatch);
        // Starts that come no nearer from one sweep to the next are not forgotten within a chunk.
        const bool nearer = first || todo.empty() || apart < 0.5 * before;
        report.forgot = nearer && growth <= kRegrown;
        before = apart;
      }
      if (!report.forgot) {
        // Chunks then run in order, once, to the bits of the sequential mode.
        todo = earliest_inexact();
        report.mismatch = 0.0;
      }
    }
    return report;
  }

 private:
  // Chunks whose start is not their neighbour's end: by bits, or by more than the tolerance where the chunk
  // has shown that it forgets.
  std::vector<int64_t> disagreeing(double* largest, double* accepted) {
    std::vector<int64_t> found;
    *accepted = 0.0;
    for (int64_t c = 1; c < count(); ++c) {
      if (is_first(c)) continue;
      const float *mine = start(c), *theirs = end(c - 1);
      if (std::memcmp(mine, theirs, width_ * sizeof(float)) == 0) continue;
      double apart = 0.0, size = 1.0;
      for (int64_t i = 0; i < width_; ++i) {
        const double d = std::fabs(static_cast<double>(mine[i]) - theirs[i]);
        if (!(d <= apart)) apart = d;
        if (d != d) break;
        size = std::max(size, std::fabs(static_cast<double>(theirs[i])));
      }
      if (met_[c] && apart <= kAccepted * tolerance_ * (step_.relative ? size : 1.0)) {
        *accepted = std::max(*accepted, apart);
      } else {
        found.push_back(c);
        if (!(apart <= *largest)) *largest = apart;
      }
    }
    return found;
  }

  // The first chunk of each sequence that may differ from the sequential mode by a bit.
  std::vector<int64_t> earliest_inexact() const {
    std::vector<int64_t> found;
    for (int64_t c = 0; c < count(); ++c) {
      if (exact_[c]) continue;
      if (found.empty() || chunks_[found.back()].sequence != chunks_[c].sequence) found.push_back(c);
    }
    return found;
  }

  // Returns the largest growth of a distance.
  float sweep(const std::vector<int64_t>& todo, bool again, Report* report) {
    std::vector<ReservoirRow> rows;
    for (const int64_t c : todo) {
      if (again) std::memcpy(start(c), end(c - 1), width_ * sizeof(float));
      rows.push_back(row_of(c, again && report->forgot));
    }
    step_.independent = step_.independent && !again;
    advance(rows);
    ++report->sweeps;
    float growth = 1.0f;
    const std::vector<bool> exact = exact_;
    for (size_t i = 0; i < todo.size(); ++i) {
      const int64_t c = todo[i];
      report->work += rows[i].ran;
      growth = std::max(growth, rows[i].growth);
      met_[c] = rows[i].met;
      exact_[c] = !rows[i].met && (is_first(c) || (again && exact[c - 1]));
      if (rows[i].ran == rows[i].steps) {
        std::memcpy(end(c), rows[i].slot[rows[i].steps % 2], width_ * sizeof(float));
      }
    }
    return growth;
  }

  ReservoirRow row_of(int64_t c, bool compare) {
    const Chunk& chunk = chunks_[c];
    const int64_t length = streams_.sequences[chunk.sequence].length;
    const int64_t t = streams_.reverse ? length - 1 - chunk.begin : chunk.begin;
    const int64_t state_at = streams_.states_at[chunk.sequence] + t * streams_.state_stride;
    ReservoirRow row{};
    row.inputs = streams_.inputs + streams_.inputs_at[chunk.sequence] + t * streams_.input_stride;
    row.states = streams_.states + state_at;
    for (int i = 0; i < 2; ++i) {
      row.slot[i] = end(c) + (1 + i) * width_;
      row.sent[i] = step_.adjoint ? row.slot[i] + 2 * width_ : row.slot[i];
    }
    std::memcpy(row.slot[0], start(c), width_ * sizeof(float));
    if (step_.adjoint) {
      row.gain = streams_.gain + state_at;
      // The start belongs to the step before, as its gain does; the very first is zero.
      if (chunk.begin > 0) send(row.gain - step_.state_step, row);
    }
    row.steps = chunk.length;
    row.compare = compare;
    row.growth = 1.0f;
    return row;
  }

  void send(const float* gain, const ReservoirRow& row) {
    const ReservoirLayout& layout = step_.layout;
    for (int64_t g = 0; g < layout.groups; ++g) {
      for (int64_t i = 0; i < layout.size; ++i) {
        const int64_t at = g * layout.padded + i;
        row.sent[0][at] = gain[g * layout.size + i] * row.slot[0][at];
      }
    }
  }

  // Threads split the rows where the weights fit in each one's cache and there are enough rows; else they
  // split the units, and wait for one another after every step.
  void advance(std::vector<ReservoirRow>& rows) {
    const int64_t count = static_cast<int64_t>(rows.size()), threads = torch::stable::get_num_threads();
    const int64_t panels = panels_of(step_.layout, kernels_.panel);
    const int64_t each = step_.kind == WeightKind::groups ? 6 : 1;
    if (threads > 1 && count >= each * threads && weight_bytes_ <= kCacheBytes) {
      parallel_workers(threads, [&](int64_t worker) {
        const int64_t begin = count * worker / threads, stop = count * (worker + 1) / threads;
        ReservoirTeam team{1, panels, 0, 0};
        run_member(&team, 0, 1, rows.data() + begin, stop - begin, nullptr);
      });
      return;
    }
    const int64_t worth = work_per_step_ * count / kWorkPerPart;
    const int64_t parts = std::max<int64_t>(1, std::min({threads, panels, worth}));
    ReservoirTeam team{parts, panels, 0, 0};
    Scratch differ(parts * count * 4);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t stop) {
      run_member(&team, begin, stop, rows.data(), count, differ.get());
    });
  }

  void run_member(ReservoirTeam* team, int64_t begin, int64_t stop, ReservoirRow* rows, int64_t count,
                  float* differ) {
    if (count == 0) return;
    const int64_t turned = step_.kind == WeightKind::csr ? (count + kPadding) * width_ : 0;
    Scratch scratch(count * 2 * kernels_.panel + turned), own(differ ? 1 : count * 4), nearest(count);
    std::vector<int32_t> active(count);
    ReservoirMember member{team,          begin,        stop, scratch.get(), differ ? differ : own.get(),
                           nearest.get(), active.data()};
    kernels_.run(step_, rows, count, member);
  }

  const ReservoirKernels& kernels_;
  ReservoirStep step_;
  const Streams& streams_;
  std::vector<Chunk> chunks_;
  float tolerance_;
  int64_t work_per_step_, weight_bytes_, width_, slots_;
  Scratch buffer_;
  std::vector<bool> met_, exact_;  // exact: the bits of the sequential mode
};

}  // namespace resformer::reservoir_host
