// The reservoir's kernels for one instruction set: packing, and stepping rows through time.
#include <sched.h>

#include <limits>

#include "reservoir/reservoir_product.h"

namespace resformer::RESFORMER_ISA {
namespace {

constexpr int64_t kFewRows = 4;  // fewer rows than this are multiplied by a CSR weight one by one

struct Panel {
  int64_t group, first, width;  // first: within the group

  int64_t position(const ReservoirLayout& layout) const { return group * layout.padded + first; }
};

Panel panel_at(const ReservoirLayout& layout, int64_t p) {
  const int64_t each = (layout.padded + kPanel - 1) / kPanel, first = p % each * kPanel;
  return {p / each, first, least(kPanel, layout.padded - first)};
}

template <class In, class Out>
void pack_as(const ReservoirMatrix& m, const ReservoirLayout& layout, const Panel& panel, Out* out) {
  const In* from = static_cast<const In*>(m.data) + panel.group * m.group_stride;
  out += panel.position(layout) * m.k;
  const int64_t real = least(panel.width, layout.size - panel.first);
  // A few k at a time: accesses are near each other whichever way the matrix is stored.
  for (int64_t begin = 0; begin < m.k; begin += kLanes) {
    const int64_t end = least(m.k, begin + kLanes);
    for (int64_t j = 0; j < panel.width; ++j) {
      const In* unit = from + (panel.first + j) * m.unit_stride;
      for (int64_t k = begin; k < end; ++k) {
        Out value{};
        if (j < real) {
          if constexpr (sizeof(In) == sizeof(Out)) {
            value = unit[k * m.k_stride];
          } else {
            value = to_scalar(unit[k * m.k_stride]);
          }
        }
        out[k * panel.width + j] = value;
      }
    }
  }
}

void pack(const ReservoirMatrix& m, const ReservoirLayout& layout, int64_t p, bool widen, void* out) {
  const Panel panel = panel_at(layout, p);
  if (m.dtype == DType::float32) return pack_as<float>(m, layout, panel, static_cast<float*>(out));
  if (widen) return pack_as<bf16>(m, layout, panel, static_cast<float*>(out));
  pack_as<bf16>(m, layout, panel, static_cast<bf16*>(out));
}

void wait_for_team(const ReservoirMember& member) {
  ReservoirTeam& team = *member.team;
  const int64_t own = member.end - member.begin;
  if (own == team.parts) return;
  const int64_t generation = __atomic_load_n(&team.generation, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&team.arrived, own, __ATOMIC_ACQ_REL) == team.parts) {
    __atomic_store_n(&team.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team.generation, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int64_t spins = 0; __atomic_load_n(&team.generation, __ATOMIC_ACQUIRE) == generation; ++spins) {
    if (spins < 4096) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

Vec load_some(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float padded[kLanes] = {};
  if (n > 0) memcpy(padded, p, n * sizeof(float));
  return load(padded);
}

void store_some(float* p, Vec x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  float padded[kLanes];
  store(padded, x);
  if (n > 0) memcpy(p, padded, n * sizeof(float));
}

Vec absolute(Vec x) { return max(x, sub(zero(), x)); }

Vec negative(Vec x) { return sub(zero(), x); }

Vec exp(Vec x) {
  Vec two_n;
  const Vec p = reduced_exp(clamp_low(x, -87.0f), &two_n);
  return fma(p, two_n, two_n);
}

// log(1 + t) for t in [0, 1], as 2 atanh(w): no cancellation near zero.
Vec log1p(Vec t) {
  const Vec w = div(t, add(t, set1(2.0f))), v = mul(w, w);
  Vec p = fma(v, set1(0.2815777831f), set1(0.2796515776f));
  p = fma(p, v, set1(0.4002459523f));
  p = fma(p, v, set1(0.6666632164f));
  return mul(w, fma(p, v, set1(2.0f)));
}

Vec sigmoid(Vec z) {
  const Vec e = exp(negative(clamp_low(negative(z), -30.0f)));  // e^30 + 1 is e^30
  return div(e, add(e, set1(1.0f)));
}

// max returns its second operand where either is NaN.
Vec activate(Activation activation, Vec z) {
  switch (activation) {
    case Activation::tanh:
      return tanh(z, nullptr);
    case Activation::relu:
      return max(zero(), z);
    case Activation::sigmoid:
      return sigmoid(z);
    case Activation::softplus:
      return add(max(zero(), z), log1p(exp(negative(absolute(z)))));
    case Activation::identity:
      break;
  }
  return z;
}

template <class E>
class Stepper {
 public:
  Stepper(const ReservoirStep& step, ReservoirRow* rows, int64_t count, ReservoirMember& member)
      : s_(step), rows_(rows), count_(count), member_(member) {}

  void run() {
    int32_t* active = member_.active;
    int64_t n = count_;
    for (int64_t i = 0; i < n; ++i) {
      active[i] = static_cast<int32_t>(i);
      member_.nearest[i] = std::numeric_limits<float>::infinity();
    }
    const ReservoirTeam& team = *member_.team;
    for (int64_t t = 0; n > 0; ++t) {
      if (s_.kind == WeightKind::csr && n >= kFewRows) turn_rows(t, n);
      for (int64_t part = member_.begin; part < member_.end; ++part) {
        float* differ = differ_of(t, part);
        for (int64_t i = 0; i < 2 * n; ++i) differ[i] = 0.0f;
        const int64_t end = team.panels * (part + 1) / team.parts;
        for (int64_t p = team.panels * part / team.parts; p < end;) p += step_panels(t, n, p, end, differ);
      }
      if (!s_.independent) wait_for_team(member_);
      n = retire(t, n);
    }
  }

 private:
  float* differ_of(int64_t t, int64_t part) const {
    return member_.differ + ((t & 1) * member_.team->parts + part) * count_ * 2;
  }

  bool compares(const ReservoirRow& row, int64_t t) const {
    return row.compare && (t % kCheckEvery == kCheckEvery - 1 || t + 1 == row.steps);
  }

  // Steps one panel, or two, of every active row; returns the number of panels.
  int64_t step_panels(int64_t t, int64_t n, int64_t p, int64_t end, float* differ) {
    const Panel panel = panel_at(s_.layout, p);
    int64_t taken = 1;
    if (n <= kWideRows && p + 1 < end) {
      const Panel next = panel_at(s_.layout, p + 1);
      if (next.group == panel.group && next.width == kPanel) taken = 2;
    }
    const int64_t z_row = 2 * kPanel;
    float* z = member_.scratch;
    if (s_.kind != WeightKind::entries || s_.inputs > 0) products(t, n, panel, taken == 2, z, z_row);
    for (int64_t i = 0; i < n; ++i) {
      finish(rows_[member_.active[i]], t, panel, taken * panel.width, z + i * z_row, differ + 2 * i);
    }
    return taken;
  }

  void products(int64_t t, int64_t n, const Panel& panel, bool pair, float* z, int64_t z_row) {
    const int64_t position = panel.position(s_.layout);
    constexpr int64_t kRows = 8 * kTileRows;
    const float* a[kRows];
    for (int64_t from = 0; from < n; from += kRows) {
      const int64_t rows = least(kRows, n - from);
      const auto gather = [&](auto pointer) {
        for (int64_t i = 0; i < rows; ++i) a[i] = pointer(rows_[member_.active[from + i]]);
      };
      float* out = z + from * z_row;
      if (s_.inputs > 0) {
        gather([&](const ReservoirRow& row) { return row.inputs + t * s_.input_step; });
        multiply(a, rows, s_.input_weight + position * s_.inputs, s_.inputs, panel.width, pair, out, z_row,
                 false);
      }
      if (s_.kind == WeightKind::groups) {
        const int64_t sender = panel.group * s_.layout.padded;
        gather([&](const ReservoirRow& row) { return row.sent[t & 1] + sender; });
        multiply(a, rows, static_cast<const E*>(s_.weight) + position * s_.layout.size, s_.layout.size,
                 panel.width, pair, out, z_row, s_.inputs > 0);
      }
    }
    if (s_.kind == WeightKind::csr) sparse_products(t, n, position, (pair ? 2 : 1) * panel.width, z, z_row);
  }

  float* turned(int64_t n) const { return member_.scratch + count_ * 2 * kPanel + n * s_.layout.width(); }

  // The factors of W, transposed: vectors of one unit over kLanes rows.
  void turn_rows(int64_t t, int64_t n) {
    const float* a[kLanes];
    for (int64_t from = 0; from < n; from += kLanes) {
      const int64_t rows = least(kLanes, n - from);
      for (int64_t i = 0; i < rows; ++i) a[i] = rows_[member_.active[from + i]].sent[t & 1];
      turn(a, rows, s_.layout.width(), turned(from));
    }
  }

  void sparse_products(int64_t t, int64_t n, int64_t begin, int64_t width, float* z, int64_t z_row) {
    const int64_t end = least(begin + width, s_.layout.units());
    const float* weight = static_cast<const float*>(s_.weight);
    const int32_t* columns = s_.columns;
    if (n < kFewRows) {
      for (int64_t i = 0; i < n; ++i) {
        const float* sent = rows_[member_.active[i]].sent[t & 1];
        float sums[2 * kPanel] = {};
        sum_sparse(
            s_.rows, begin, end, 0.0f,
            [&](int64_t e, float sum) { return fma(weight[e], sent[columns[e]], sum); },
            [&](int64_t unit, float sum) { sums[unit - begin] = sum; });
        add_to(z + i * z_row, sums, width);
      }
      return;
    }
    float sums[kPanel * kLanes] = {}, back[kLanes * kPanel];
    for (int64_t from = 0; from < n; from += kLanes) {
      const float* sent = turned(from);
      sum_sparse(
          s_.rows, begin, end, zero(),
          [&](int64_t e, Vec sum) { return fma(set1(weight[e]), load(sent + columns[e] * kLanes), sum); },
          [&](int64_t unit, Vec sum) { store(sums + (unit - begin) * kLanes, sum); });
      for (int64_t at = 0; at < width; at += kLanes) {
        transpose_block(reinterpret_cast<const uint32_t*>(sums + at * kLanes), kLanes,
                        reinterpret_cast<uint32_t*>(back + at), kPanel);
      }
      const int64_t rows = least(kLanes, n - from);
      for (int64_t i = 0; i < rows; ++i) add_to(z + (from + i) * z_row, back + i * kPanel, width);
    }
  }

  // z holds the inputs' product, where there are inputs.
  void add_to(float* z, const float* sums, int64_t width) const {
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec sum = load(sums + j);
      store(z + j, s_.inputs > 0 ? add(load(z + j), sum) : sum);
    }
  }

  // One vector of W h, for weights of one entry per row.
  Vec sparse_product(const ReservoirRow& row, int64_t t, int64_t q) const {
    const float* sent = row.sent[t & 1];
    const float* weight = static_cast<const float*>(s_.weight);
    if (s_.runs[q / kPadding]) return mul(load(weight + q), load(sent + s_.columns[q]));
    float picked[kLanes];
    for (int j = 0; j < kLanes; ++j) picked[j] = sent[s_.columns[q + j]];
    return mul(load(weight + q), load(picked));
  }

  void finish(ReservoirRow& row, int64_t t, const Panel& panel, int64_t width, const float* z,
              float* differ) {
    const int64_t position = panel.position(s_.layout);
    const int64_t unit = panel.group * s_.layout.size + panel.first, real = s_.layout.size - panel.first;
    const float* state = row.slot[t & 1] + position;
    float *next = row.slot[(t + 1) & 1] + position, *out = row.states + t * s_.state_step + unit;
    const float* drive = row.inputs + t * s_.input_step + unit;
    const bool compare = compares(row, t);
    Vec apart = zero(), largest = zero(), poison = zero();
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t left = real - j;
      Vec sum = s_.kind != WeightKind::entries || s_.inputs > 0 ? load(z + j) : zero();
      if (s_.kind == WeightKind::entries) sum = add(sum, sparse_product(row, t, position + j));
      if (s_.inputs == 0) sum = add(sum, load_some(drive + j, left));
      if (s_.bias) sum = add(sum, load(s_.bias + position + j));
      const Vec kept = load(s_.retain + position + j), amplitude = load(s_.amplitude + position + j);
      const Vec fresh = s_.adjoint ? sum : mul(amplitude, activate(s_.activation, sum));
      const Vec h = fma(kept, load(state + j), fresh);
      if (compare) {
        const Vec difference = sub(h, load_some(out + j, left));
        apart = max(apart, absolute(difference));
        largest = max(largest, absolute(h));
        // A maximum drops a NaN, a sum does not; an infinite distance has not met.
        poison = fma(difference, zero(), poison);
      }
      store_some(out + j, h, left);
      store(next + j, h);
      if (s_.adjoint) {
        const float* gain = row.gain + t * s_.state_step + unit;
        store(row.sent[(t + 1) & 1] + position + j, mul(h, load_some(gain + j, left)));
      }
    }
    if (compare) {
      const float d = reduce_max(apart) + reduce_add(poison), size = reduce_max(largest);
      if (differ[0] == differ[0] && !(d <= differ[0])) differ[0] = d;
      if (size > differ[1]) differ[1] = size;
    }
  }

  int64_t retire(int64_t t, int64_t n) {
    const ReservoirTeam& team = *member_.team;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      ReservoirRow& row = rows_[member_.active[i]];
      bool met = false;
      if (compares(row, t)) {
        met = true;
        float apart = 0.0f, largest = 1.0f;
        for (int64_t part = 0; part < team.parts; ++part) {
          const float* differ = differ_of(t, part) + 2 * i;
          if (!(differ[0] <= apart)) apart = differ[0];
          if (differ[1] > largest) largest = differ[1];
          met = met && apart == apart;
        }
        met = met && apart <= s_.tolerance * (s_.relative ? largest : 1.0f);
        float& nearest = member_.nearest[member_.active[i]];
        if (member_.begin == 0 && apart > nearest * row.growth) row.growth = apart / nearest;
        if (apart < nearest) nearest = apart;
      }
      if (met || t + 1 == row.steps) {
        if (member_.begin == 0) {
          row.ran = t + 1;
          row.met = met;
        }
      } else {
        member_.active[kept++] = member_.active[i];
      }
    }
    return kept;
  }

  const ReservoirStep& s_;
  ReservoirRow* rows_;
  int64_t count_;
  ReservoirMember& member_;
};

void run(const ReservoirStep& step, ReservoirRow* rows, int64_t count, ReservoirMember& member) {
  if (step.weight_dtype == DType::bfloat16) return Stepper<bf16>(step, rows, count, member).run();
  Stepper<float>(step, rows, count, member).run();
}

}  // namespace

extern const ReservoirKernels reservoir_kernels = {kPanel, pack, run};

}  // namespace resformer::RESFORMER_ISA
