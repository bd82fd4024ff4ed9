// resformer::linear_scan_* on CPU tensors: checks, and the steps of a walk over the sequences. The arithmetic
// is in scan_cpu_isa.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/non_temporal.h"
#include "common/tensor_args.h"
#include "scan/scan_walk.h"

namespace resformer {

RESFORMER_DISPATCH(ScanKernels, scan_kernels)

namespace scan_host {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_complex(const Tensor& t) { return t.scalar_type() == ScalarType::ComplexFloat; }

// Dtype of a real number, or of the parts of a complex one.
DType part_dtype(const Tensor& t, const char* name) {
  return is_complex(t) ? DType::float32 : dtype_of(t, name);
}

ScalarType state_type(const Tensor& tokens) {
  return is_complex(tokens) ? ScalarType::ComplexFloat : ScalarType::Float;
}

void check_operand(const Tensor& t, const char* name, const Tensor& tokens, int64_t rank) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() == rank, name, " must have ", rank, " axes, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == tokens.scalar_type() || t.scalar_type() == state_type(tokens), name,
                  " must have tokens' dtype, or be float32 beside 16-bit tokens");
  const int64_t last = rank - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1, name,
                  " must be contiguous in its last axis, got stride ", t.stride(last));
}

void check_shape(const Tensor& t, const char* name, const Tensor& tokens) {
  for (int64_t i = 0; i < tokens.dim(); ++i) check_size(t, name, i, tokens.size(i));
}

// Checks and plain data that forward and backward share. `like` has tokens' shape and dtype.
struct Call {
  ScanSequences sequences;
  std::vector<ScanRun> runs;
  int64_t rows = 1;  // steps of a sequence, or all packed tokens
  int64_t channels = 0, parts = 1, width = 0;
  bool stream = false;
  std::vector<float> constant_gates;

  Call(const Tensor& like, const Tensor& gates, const std::optional<Tensor>& initial_state, bool reverse,
       const std::optional<Tensor>& cu_seqlens) {
    const bool packed = cu_seqlens.has_value();
    const int64_t rank = packed ? 2 : 3;
    check_operand(like, "tokens", like, rank);
    dtype_of_parts(like);
    channels = like.size(rank - 1);
    parts = is_complex(like) ? 2 : 1;
    width = channels * parts;
    rows = like.size(rank - 2);
    if (packed) {
      const int32_t* starts = check_cu_seqlens(*cu_seqlens, "cu_seqlens", rows);
      sequences = {cu_seqlens->numel() - 1, 0, starts, reverse};
    } else {
      sequences = {like.size(0), rows, nullptr, reverse};
    }
    if (gates.dim() == 1) {
      check_operand(gates, "gates", like, 1);
      check_size(gates, "gates", 0, channels);
      constant_gates.assign(width + kScanPad, 0.0f);
      widen(gates, 0, 0, width, constant_gates.data());
    } else {
      check_operand(gates, "gates", like, rank);
      check_shape(gates, "gates", like);
    }
    if (initial_state) check_state(*initial_state, "initial_state", like);
    if (width > 0) runs = runs_of(sequences);
    stream = like.numel() * parts * static_cast<int64_t>(sizeof(float)) >= kNonTemporalBytes;
  }

  static void dtype_of_parts(const Tensor& like) { part_dtype(like, "tokens"); }

  void check_state(const Tensor& state, const char* name, const Tensor& like) const {
    check_operand(state, name, like, 2);
    check_size(state, name, 0, sequences.count);
    check_size(state, name, 1, channels);
  }

  // Elements [begin, end) of row `row`, in float32.
  void widen(const Tensor& t, int64_t row, int64_t begin, int64_t end, float* to) const {
    const int64_t start = (t.dim() == 2 ? row * t.stride(0) * parts : 0) + begin;
    const DType dtype = part_dtype(t, "initial_state");
    for (int64_t i = 0; i < end - begin; ++i) {
      if (dtype == DType::float32) {
        to[i] = static_cast<const float*>(t.data_ptr())[start + i];
      } else if (dtype == DType::bfloat16) {
        to[i] = to_float(static_cast<const bf16*>(t.data_ptr())[start + i]);
      } else {
        to[i] = to_float(static_cast<const f16*>(t.data_ptr())[start + i]);
      }
    }
  }

  // Rows of a tensor of tokens' shape.
  ScanRows rows_of(const Tensor& t) const {
    const int64_t rank = t.dim();
    return {t.data_ptr(), rank == 3 ? t.stride(0) * parts : 0, t.stride(rank - 2) * parts};
  }

  ScanRows gate_rows(const Tensor& gates) const { return gates.dim() == 1 ? ScanRows{} : rows_of(gates); }

  const float* constant() const { return constant_gates.empty() ? nullptr : constant_gates.data(); }

  // Zero-fills packed rows after the last sequence.
  void clear_rest(const Tensor& t) const {
    if (sequences.starts == nullptr) return;
    const int64_t used = sequences.starts[sequences.count];
    const int64_t size = is_complex(t) ? 8 : t.scalar_type() == ScalarType::Float ? 4 : 2;
    std::memset(static_cast<char*>(t.data_ptr()) + used * channels * size, 0,
                (rows - used) * channels * size);
  }
};

Tensor fresh(const Tensor& like, const Tensor& shape_of, ScalarType dtype) {
  const auto sizes = shape_of.sizes();
  return output(like, {sizes.begin(), sizes.end()}, dtype);
}

struct Forward {
  static constexpr bool against = false;
  const Call& call;
  const ScanForward& scan;
  ScanKernels kernels;
  const std::optional<Tensor>& initial;
  float* final_state;

  void enter(int64_t s, int64_t begin, int64_t end, float* carry) const {
    if (initial) call.widen(*initial, s, begin, end, carry);
  }
  void step(const ScanRun&, int64_t s, int64_t block, int64_t begin, int64_t end, float* carry) const {
    kernels.forward(scan, call.sequences.piece(s, block, against), begin, end, {carry});
  }
  void leave(int64_t s, int64_t begin, int64_t end, const float* carry) const {
    std::copy_n(carry, end - begin, final_state + s * call.width + begin);
  }
};

std::tuple<Tensor, Tensor> linear_scan_forward(Tensor gates, Tensor tokens,
                                               std::optional<Tensor> initial_state, bool reverse,
                                               std::optional<Tensor> cu_seqlens) {
  const Call call(tokens, gates, initial_state, reverse, cu_seqlens);
  Tensor states = fresh(tokens, tokens, tokens.scalar_type());
  Tensor final_state = output(tokens, {call.sequences.count, call.channels}, state_type(tokens));
  const ScanForward scan{
      part_dtype(tokens, "tokens"), part_dtype(gates, "gates"), is_complex(tokens),   call.stream,
      call.rows_of(tokens),         call.gate_rows(gates),      call.rows_of(states), call.constant()};
  const Forward forward{call, scan, current_scan_kernels(), initial_state,
                        static_cast<float*>(final_state.data_ptr())};
  ScanWalk<Forward>(call.sequences, call.runs, call.width, forward).run();
  call.clear_rest(states);
  return {states, final_state};
}

struct Backward {
  static constexpr bool against = true;
  const Call& call;
  const ScanBackward& scan;
  ScanKernels kernels;
  const std::optional<Tensor>& grad_final;
  const std::optional<Tensor>& initial;
  const Tensor* d_initial;
  double* sums;  // (slots, sum_width); null: not wanted
  int64_t sum_width;

  void enter(int64_t s, int64_t begin, int64_t end, float* carry) const {
    if (grad_final) call.widen(*grad_final, s, begin, end, carry);
  }

  void step(const ScanRun& run, int64_t s, int64_t block, int64_t begin, int64_t end, float* carry) const {
    ScanState state{carry};
    if (sums != nullptr) {
      state.sums = sums + (run.slot + (run.alone() ? block : 0)) * sum_width + begin;
      if (run.alone()) std::fill_n(state.sums, end - begin, 0.0);
    }
    float before[kMostLanes + kScanPad];
    if (block == 0 && (sums != nullptr || scan.d_gates.data != nullptr)) {
      std::fill_n(before, end - begin + kScanPad, 0.0f);
      if (initial) call.widen(*initial, s, begin, end, before);
      state.before = before;
    }
    kernels.backward(scan, call.sequences.piece(s, block, against), begin, end, state);
  }

  void leave(int64_t s, int64_t begin, int64_t end, const float* carry) const {
    if (d_initial == nullptr) return;
    const DType dtype = part_dtype(*d_initial, "initial_state");
    for (int64_t i = begin; i < end; ++i)
      store_as(dtype, d_initial->data_ptr(), s * call.width + i, carry[i - begin]);
  }
};

// Adds the slots' sums in order.
void add_slots(const std::vector<double>& sums, int64_t slots, int64_t sum_width, int64_t width,
               const Tensor& to) {
  const DType dtype = part_dtype(to, "gates");
  std::vector<double> total(width, 0.0);
  torch::stable::parallel_for(0, width, kLeastLanes, [&](int64_t begin, int64_t end) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t i = begin; i < end; ++i) total[i] += sums[slot * sum_width + i];
    }
    for (int64_t i = begin; i < end; ++i) store_as(dtype, to.data_ptr(), i, total[i]);
  });
}

constexpr int64_t kWantsTokens = 1, kWantsGates = 2, kWantsInitial = 4;

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(std::optional<Tensor> grad_states,
                                                        std::optional<Tensor> grad_final, Tensor gates,
                                                        Tensor states, std::optional<Tensor> initial_state,
                                                        bool reverse, std::optional<Tensor> cu_seqlens,
                                                        int64_t grad_mask) {
  const auto wants = [&](int64_t bit) { return (grad_mask & bit) != 0; };
  const auto absent = [&](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  const Call call(states, gates, initial_state, reverse, cu_seqlens);
  if (grad_states) {
    check_operand(*grad_states, "grad_states", states, states.dim());
    check_shape(*grad_states, "grad_states", states);
    STD_TORCH_CHECK(grad_states->scalar_type() == states.scalar_type(),
                    "grad_states must have the states' dtype");
  }
  if (grad_final) call.check_state(*grad_final, "grad_final", states);
  STD_TORCH_CHECK(initial_state || !wants(kWantsInitial),
                  "grad_mask asks for the gradient of an absent initial_state");

  Tensor d_tokens = wants(kWantsTokens) ? fresh(states, states, states.scalar_type()) : absent(states);
  Tensor d_gates = wants(kWantsGates) ? fresh(gates, gates, gates.scalar_type()) : absent(gates);
  Tensor d_initial = wants(kWantsInitial)
                         ? fresh(*initial_state, *initial_state, initial_state->scalar_type())
                         : absent(states);
  const bool by_step = wants(kWantsGates) && gates.dim() != 1, summed = wants(kWantsGates) && !by_step;
  const ScanBackward scan{part_dtype(states, "states"),
                          part_dtype(gates, "gates"),
                          is_complex(states),
                          call.stream,
                          grad_states ? call.rows_of(*grad_states) : ScanRows{},
                          call.gate_rows(gates),
                          call.rows_of(states),
                          wants(kWantsTokens) ? call.rows_of(d_tokens) : ScanRows{},
                          by_step ? call.rows_of(d_gates) : ScanRows{},
                          call.constant()};
  const int64_t slots = slots_of(call.sequences, call.runs), sum_width = call.width + kScanPad;
  std::vector<double> sums(summed ? slots * sum_width : 0, 0.0);
  const Backward backward{call,
                          scan,
                          current_scan_kernels(),
                          grad_final,
                          initial_state,
                          wants(kWantsInitial) ? &d_initial : nullptr,
                          summed ? sums.data() : nullptr,
                          sum_width};
  ScanWalk<Backward>(call.sequences, call.runs, call.width, backward).run();
  if (wants(kWantsTokens)) call.clear_rest(d_tokens);
  if (by_step) call.clear_rest(d_gates);
  if (summed) add_slots(sums, slots, sum_width, call.width, d_gates);
  return {d_tokens, d_gates, d_initial};
}

}  // namespace
}  // namespace scan_host
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&resformer::scan_host::linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&resformer::scan_host::linear_scan_backward));
}
