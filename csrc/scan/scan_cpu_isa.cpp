// Scan kernels for one instruction set. They are bound by memory: each operand is read once, in order, and
// the state of the channels stays in the first-level cache.
#include "scan/lanes.h"
#include "scan/scan.h"

namespace resformer::RESFORMER_ISA {
namespace {

template <class T>
RESFORMER_INLINE Vec get(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_first(p, n);
}

template <bool STREAM, class T>
RESFORMER_INLINE void put(T* p, Vec x, int64_t n) {
  if (n != kLanes) return store_first(p, x, n);
  if constexpr (STREAM) {
    stream(p, x);
  } else {
    store(p, x);
  }
}

template <bool COMPLEX>
RESFORMER_INLINE Vec fma_of(Vec a, Vec b, Vec c) {
  if constexpr (COMPLEX) return complex_fma(a, b, c);
  return fma(a, b, c);
}

template <bool COMPLEX>
RESFORMER_INLINE Vec conj_mul_of(Vec a, Vec b) {
  if constexpr (COMPLEX) return conj_mul(a, b);
  return mul(a, b);
}

// Iterates over the rows of one operand.
template <class T>
struct Walk {
  T* at;
  int64_t by;

  Walk(const ScanRows& rows, const ScanPiece& piece, int64_t begin)
      : at(rows.data == nullptr
               ? nullptr
               : static_cast<T*>(rows.data) + piece.sequence * rows.sequence + piece.row * rows.step + begin),
        by(rows.data == nullptr ? 0 : piece.direction * rows.step) {}

  void next() { at += by; }

  void prefetch(int64_t rows, int64_t c) const { prefetch_line(at + rows * by + c); }
};

template <class T>
int64_t rows_ahead(int64_t lanes) {
  return smaller(64, 1 + kPrefetchBytes / (lanes * static_cast<int64_t>(sizeof(T))));
}

// Whether every full vector of the rows starts at a multiple of its size, as non-temporal stores need.
template <class T>
bool aligned(const Walk<T>& rows) {
  constexpr uintptr_t mask = kLanes * sizeof(T) - 1;
  return ((reinterpret_cast<uintptr_t>(rows.at) | static_cast<uintptr_t>(rows.by * sizeof(T))) & mask) == 0;
}

// next() moves on by a step; at(i, c, n, carry) returns the new carry of the n lanes from c on. A carry of at
// most one vector stays in a register.
template <class Next, class At>
RESFORMER_INLINE void for_steps(int64_t steps, int64_t lanes, float* carry, const Next& next, const At& at) {
  if (lanes <= kLanes) {
    Vec kept = load(carry);
    for (int64_t i = 0; i < steps; ++i, next()) kept = at(i, 0, lanes, kept);
    return store(carry, kept);
  }
  for (int64_t i = 0; i < steps; ++i, next()) {
    int64_t c = 0;
    for (; c + kLanes <= lanes; c += kLanes) store(carry + c, at(i, c, kLanes, load(carry + c)));
    if (c < lanes) store(carry + c, at(i, c, lanes - c, load(carry + c)));
  }
}

template <class T, class G, bool COMPLEX, bool CONSTANT, bool STREAM>
void forward_steps(const ScanForward& f, const ScanPiece& piece, int64_t begin, int64_t end, float* carry) {
  const int64_t lanes = end - begin, ahead = rows_ahead<T>(lanes);
  Walk<const T> x(f.tokens, piece, begin);
  Walk<const G> g(f.gates, piece, begin);
  Walk<T> h(f.states, piece, begin);
  const float* constant = CONSTANT ? f.constant_gates + begin : nullptr;
  const auto next = [&]() __attribute__((always_inline)) {
    x.next();
    if constexpr (!CONSTANT) g.next();
    h.next();
  };
  for_steps(piece.steps, lanes, carry, next,
            [&](int64_t, int64_t c, int64_t n, Vec before) __attribute__((always_inline)) {
              x.prefetch(ahead, c);
              Vec gate;
              if constexpr (CONSTANT) {
                gate = load(constant + c);
              } else {
                g.prefetch(ahead, c);
                gate = get(g.at + c, n);
              }
              const Vec state = fma_of<COMPLEX>(gate, before, get(x.at + c, n));
              put<STREAM>(h.at + c, state, n);
              return state;
            });
  if constexpr (STREAM) end_of_stream();
}

template <class T, class G, bool COMPLEX, bool CONSTANT>
void forward_as(const ScanForward& f, const ScanPiece& piece, int64_t begin, int64_t end, float* carry) {
  if (f.stream && aligned(Walk<T>(f.states, piece, begin)))
    return forward_steps<T, G, COMPLEX, CONSTANT, true>(f, piece, begin, end, carry);
  forward_steps<T, G, COMPLEX, CONSTANT, false>(f, piece, begin, end, carry);
}

// One vector of one step: a = dh + carry, dx = a, dg = a conj(h before), carry = conj(g) a.
template <class T, class G, bool COMPLEX, bool CONSTANT, bool STREAM>
void backward_steps(const ScanBackward& b, const ScanPiece& piece, int64_t begin, int64_t end,
                    const ScanState& s) {
  const int64_t lanes = end - begin, ahead = rows_ahead<T>(lanes);
  Walk<const T> grad(b.grad, piece, begin);
  Walk<const G> g(b.gates, piece, begin);
  Walk<const T> h(b.states, piece, begin);
  Walk<T> dx(b.d_tokens, piece, begin);
  Walk<G> dg(b.d_gates, piece, begin);
  const float* constant = CONSTANT ? b.constant_gates + begin : nullptr;
  const bool wanted = dg.at != nullptr || s.sums != nullptr;
  h.next();  // the state before a step is that of the row visited next
  const auto next = [&]() __attribute__((always_inline)) {
    grad.next();
    if constexpr (!CONSTANT) g.next();
    h.next();
    dx.next();
    dg.next();
  };
  for_steps(piece.steps, lanes, s.carry, next,
            [&](int64_t i, int64_t c, int64_t n, Vec a) __attribute__((always_inline)) {
              if (grad.at != nullptr) {
                grad.prefetch(ahead, c);
                a = add(a, get(grad.at + c, n));
              }
              if (dx.at != nullptr) put<STREAM>(dx.at + c, a, n);
              if (wanted) {
                h.prefetch(ahead, c);
                const bool first = s.before != nullptr && i + 1 == piece.steps;
                const Vec d = conj_mul_of<COMPLEX>(first ? load(s.before + c) : get(h.at + c, n), a);
                if constexpr (CONSTANT) {
                  add_to(s.sums + c, d);
                } else {
                  put<STREAM>(dg.at + c, d, n);
                }
              }
              Vec gate;
              if constexpr (CONSTANT) {
                gate = load(constant + c);
              } else {
                g.prefetch(ahead, c);
                gate = get(g.at + c, n);
              }
              return conj_mul_of<COMPLEX>(gate, a);
            });
  if constexpr (STREAM) end_of_stream();
}

template <class T, class G, bool COMPLEX, bool CONSTANT>
void backward_as(const ScanBackward& b, const ScanPiece& piece, int64_t begin, int64_t end,
                 const ScanState& s) {
  if (b.stream && aligned(Walk<T>(b.d_tokens, piece, begin)) && aligned(Walk<G>(b.d_gates, piece, begin)))
    return backward_steps<T, G, COMPLEX, CONSTANT, true>(b, piece, begin, end, s);
  backward_steps<T, G, COMPLEX, CONSTANT, false>(b, piece, begin, end, s);
}

// Calls run.template operator()<T, G, COMPLEX, CONSTANT>() with the types of `call`.
template <class Call, class Run>
void dispatch(const Call& call, const Run& run) {
  const bool constant = call.constant_gates != nullptr, wide = call.gates_dtype == DType::float32;
  const auto with = [&]<class T>() {
    if (constant) return run.template operator()<T, float, false, true>();
    if (wide) return run.template operator()<T, float, false, false>();
    run.template operator()<T, T, false, false>();
  };
  if (call.is_complex) {
    if (constant) return run.template operator()<float, float, true, true>();
    return run.template operator()<float, float, true, false>();
  }
  if (call.dtype == DType::float32) return with.template operator()<float>();
  if (call.dtype == DType::bfloat16) return with.template operator()<bf16>();
  with.template operator()<f16>();
}

void forward(const ScanForward& f, const ScanPiece& piece, int64_t begin, int64_t end, const ScanState& s) {
  dispatch(f, [&]<class T, class G, bool COMPLEX, bool CONSTANT>() {
    forward_as<T, G, COMPLEX, CONSTANT>(f, piece, begin, end, s.carry);
  });
}

void backward(const ScanBackward& b, const ScanPiece& piece, int64_t begin, int64_t end, const ScanState& s) {
  dispatch(b, [&]<class T, class G, bool COMPLEX, bool CONSTANT>() {
    backward_as<T, G, COMPLEX, CONSTANT>(b, piece, begin, end, s);
  });
}

}  // namespace

extern const ScanKernels scan_kernels = {forward, backward};

}  // namespace resformer::RESFORMER_ISA
