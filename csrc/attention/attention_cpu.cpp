// The op boundary: tensors to plain data, checks, output allocation, and the choice of the kernels' build.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "attention/attention.h"
#include "attention/segments.h"
#include "common/dispatch.h"
#include "common/tensor_args.h"

namespace resformer {

RESFORMER_DISPATCH_AMX(Kernels, attention_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

View view_of(const Tensor& t) {
  View v;
  v.data = t.data_ptr();
  const int64_t batch_axes = t.dim() - 3;
  v.stride[0] = batch_axes == 1 ? t.stride(0) : 0;
  for (int i = 1; i < 4; ++i) v.stride[i] = t.stride(batch_axes + i - 1);
  return v;
}

// The arguments that forward and backward share, checked and as plain data. It keeps their tensors alive.
struct Call {
  Problem problem;
  bool packed = false;
  int64_t batch = 1, q_total = 0, k_total = 0;
  Tensor sinks_float;
};

void check_values(const Call& call, const MaybeTensor& value, const char* name, const Tensor& k) {
  if (!value) return;
  check_input(*value, name, k.dim(), k.scalar_type());
  for (int64_t i = 0; i + 1 < k.dim(); ++i) check_size(*value, name, i, k.size(i));
  check_size(*value, name, k.dim() - 1, call.problem.dim_v);
}

void read_sequences(Call& call, const MaybeTensor& cu_q, const MaybeTensor& cu_k) {
  Problem& p = call.problem;
  int64_t columns = 0;
  auto push = [&](Sequence s) {
    s.diagonal = s.tk - s.tq;  // masks align at the last query and key
    s.column_start = columns;
    columns += (s.tk + kGradKeys - 1) / kGradKeys;
    p.sequences.push_back(s);
  };
  if (!call.packed) {
    for (int64_t b = 0; b < call.batch; ++b) push({b, 0, 0, call.q_total, call.k_total});
    return;
  }
  const int32_t* starts_q = check_cu_seqlens(*cu_q, "cu_seqlens_q", call.q_total);
  const int32_t* starts_k = check_cu_seqlens(*cu_k, "cu_seqlens_k", call.k_total);
  STD_TORCH_CHECK(cu_q->numel() == cu_k->numel(), "cu_seqlens_q and cu_seqlens_k must have one length, got ",
                  cu_q->numel(), " and ", cu_k->numel());
  for (int64_t i = 0; i + 1 < cu_q->numel(); ++i) {
    push({0, starts_q[i], starts_k[i], starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i]});
  }
}

Bias read_bias(const Tensor& bias, const Problem& p, const Call& call) {
  STD_TORCH_CHECK(!call.packed, "attn_bias is not taken by packed sequences");
  STD_TORCH_CHECK(bias.is_cpu() && bias.dim() == 4, "attn_bias must be a 4-D CPU tensor");
  Bias b;
  b.kind = bias.scalar_type() == ScalarType::Bool ? Bias::Kind::boolean : Bias::Kind::additive;
  if (b.kind == Bias::Kind::additive) {
    b.dtype = dtype_of(bias, "attn_bias");
    STD_TORCH_CHECK(b.dtype == DType::float32 || b.dtype == p.dtype,
                    "attn_bias must be bool, float32 or q's dtype");
  }
  b.data = bias.data_ptr();
  const int64_t full[4] = {call.batch, p.heads_q, call.q_total, call.k_total};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(bias.size(i) == full[i] || bias.size(i) == 1, "attn_bias axis ", i, " has size ",
                    bias.size(i), ", takes 1 or ", full[i]);
    b.stride[i] = bias.size(i) == 1 ? 0 : bias.stride(i);
  }
  return b;
}

Call read_call(const Tensor& q, const Tensor& k, const MaybeTensor& v, const MaybeTensor& v_first,
               const MaybeTensor& lambda_v, const MaybeTensor& lambda_first, double lambda_v_value,
               double lambda_first_value, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
               int64_t window_left, int64_t window_right, double scale, double softcap,
               const MaybeTensor& sinks, const MaybeTensor& attn_bias, const Epilogue& epilogue) {
  Call call;
  Problem& p = call.problem;
  call.packed = cu_seqlens_q.has_value();
  const int64_t rank = call.packed ? 3 : 4;
  STD_TORCH_CHECK(cu_seqlens_k.has_value() == call.packed, "cu_seqlens_q and cu_seqlens_k come together");
  STD_TORCH_CHECK(v || v_first, "v or v_first must be given");
  check_input(q, "q", rank, q.scalar_type());
  check_input(k, "k", rank, q.scalar_type());
  const Tensor& any = v ? *v : *v_first;
  STD_TORCH_CHECK(any.dim() == rank, "v must have ", rank, " axes, got ", any.dim());
  p.dtype = dtype_of(q, "q");
  p.heads_q = q.size(rank - 2);
  p.heads_kv = k.size(rank - 2);
  p.dim_k = q.size(rank - 1);
  p.dim_v = any.size(rank - 1);
  call.batch = call.packed ? 1 : q.size(0);
  call.q_total = q.size(rank - 3);
  call.k_total = k.size(rank - 3);
  p.queries_total = call.q_total;
  p.keys_total = call.k_total;
  p.epilogue = epilogue;
  if (!call.packed) check_size(k, "k", 0, call.batch);
  check_size(k, "k", rank - 1, p.dim_k);
  STD_TORCH_CHECK(p.heads_q == 0 || (p.heads_kv > 0 && p.heads_q % p.heads_kv == 0),
                  "q's heads must be a multiple of k's, got ", p.heads_q, " and ", p.heads_kv);
  p.group = p.heads_kv > 0 ? p.heads_q / p.heads_kv : 1;
  check_values(call, v, "v", k);
  check_values(call, v_first, "v_first", k);
  p.q = view_of(q);
  p.k = view_of(k);
  // An empty tensor may have no storage; a pointer that is never read still says that the argument was given.
  static float absent;
  if (v) p.v = view_of(*v);
  if (v && !p.v.data) p.v.data = &absent;
  if (v_first) p.v_first = view_of(*v_first);
  if (v_first && !p.v_first.data) p.v_first.data = &absent;
  p.lambda_v = read_coefficient(lambda_v, "lambda_v", lambda_v_value, any, p.dtype);
  p.lambda_first = read_coefficient(lambda_first, "lambda_first", lambda_first_value, any, p.dtype);
  STD_TORCH_CHECK(window_left >= -1 && window_right >= -1, "window must be -1 or more on both sides");
  STD_TORCH_CHECK(softcap >= 0.0, "softcap must be 0 or more, got ", softcap);
  p.window_left = window_left;
  p.window_right = window_right;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  read_sequences(call, cu_seqlens_q, cu_seqlens_k);
  if (sinks) {
    STD_TORCH_CHECK(sinks->is_cpu() && sinks->dim() == 1 && sinks->size(0) == p.heads_q,
                    "sinks must be (Hq,) = (", p.heads_q, ",) on the CPU");
    const DType sink_dtype = dtype_of(*sinks, "sinks");
    STD_TORCH_CHECK(sink_dtype == DType::float32 || sink_dtype == p.dtype,
                    "sinks must be float32 or q's dtype");
    call.sinks_float = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
    p.sinks = static_cast<const float*>(call.sinks_float.data_ptr());
  }
  if (attn_bias) p.bias = read_bias(*attn_bias, p, call);
  return call;
}

std::vector<int64_t> lse_shape(const Call& call) {
  if (call.packed) return {call.problem.heads_q, call.q_total};
  return {call.batch, call.problem.heads_q, call.q_total};
}

void lse_strides(const Call& call, int64_t* stride) {
  stride[0] = call.packed ? 0 : call.problem.heads_q * call.q_total;
  stride[1] = call.q_total;
  stride[2] = 1;
}

void check_rows(const Tensor& t, const char* name, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == static_cast<int64_t>(shape.size()),
      name, " must be a float32 CPU tensor with ", shape.size(), " axes");
  for (size_t i = 0; i < shape.size(); ++i) check_size(t, name, static_cast<int64_t>(i), shape[i]);
}

// Gradients arrive from autograd with any strides, expanded ones included.
Tensor row_contiguous(const Tensor& t) {
  const bool whole = t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1;
  return whole ? t : torch::stable::contiguous(t);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const MaybeTensor& v, const MaybeTensor& v_first,
    const MaybeTensor& lambda_v, const MaybeTensor& lambda_first, double lambda_v_value,
    double lambda_first_value, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
    int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/, int64_t window_left, int64_t window_right,
    double scale, double softcap, const MaybeTensor& sinks, const MaybeTensor& attn_bias, bool return_lse,
    bool return_mixed_value, const MaybeTensor& exclusive, double exclusive_value, double exclusive_eps,
    const MaybeTensor& out_gate, bool return_along, bool return_ungated) {
  const Tensor& any = v ? *v : *v_first;
  const Epilogue epilogue = read_epilogue(exclusive, exclusive_value, exclusive_eps, out_gate, q,
                                          any.size(any.dim() - 1), dtype_of(q, "q"));
  Call call =
      read_call(q, k, v, v_first, lambda_v, lambda_first, lambda_v_value, lambda_first_value, cu_seqlens_q,
                cu_seqlens_k, window_left, window_right, scale, softcap, sinks, attn_bias, epilogue);
  Problem& p = call.problem;
  std::vector<int64_t> out_shape = shape_of(q);
  out_shape.back() = p.dim_v;
  const auto asked = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType dtype) {
    return output(q, wanted ? shape : std::vector<int64_t>{0}, dtype);
  };
  Tensor out = output(q, out_shape, q.scalar_type());
  Tensor lse = asked(return_lse, lse_shape(call), ScalarType::Float);
  Tensor mixed = asked(return_mixed_value, shape_of(any), q.scalar_type());
  Tensor along = asked(return_along, lse_shape(call), ScalarType::Float);
  Tensor ungated = asked(return_ungated, out_shape, q.scalar_type());
  ForwardOutput o;
  o.out = view_of(out);
  if (return_lse) o.lse = static_cast<float*>(lse.data_ptr());
  lse_strides(call, o.lse_stride);
  if (return_mixed_value) o.mixed = view_of(mixed);
  if (return_along) o.along = static_cast<float*>(along.data_ptr());
  if (return_ungated) o.ungated = view_of(ungated);
  if (call.packed) {  // rows past the last sequence get zeros, like a row that attends to nothing
    for (Tensor* t : {&out, &mixed, &along, &ungated}) torch::stable::zero_(*t);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  // Segments overlap in keys; a returned V' needs one writer per key.
  if (!return_mixed_value) p.sequences = cut_to_windows(p);
  current_attention_kernels().forward(p, o);
  return {out, lse, mixed, along, ungated};
}

enum Gradient : int64_t { kQ, kK, kV, kVFirst, kLambdaV, kLambdaFirst, kSinks, kBias, kExclusive, kOutGate };

// A coefficient's gradient: partial sums that the kernel fills, then the sum over the broadcast axes. `value`
// is of the shape that it broadcasts to: V's, whose keys a tile may sum (`by_tile`), or the output's.
struct CoefficientGradient {
  Partial kind = Partial::none;
  Tensor partial;
  float* data = nullptr;

  CoefficientGradient(const MaybeTensor& c, const Tensor& value, const Call& call, bool by_tile = true) {
    if (!c) return;
    const int64_t rank = value.dim();
    std::vector<int64_t> shape = shape_of(value);
    if (c->size(rank - 1) == 1) {
      kind = Partial::row;
      shape[rank - 1] = 1;
    } else if (by_tile && c->size(rank - 3) == 1) {
      kind = Partial::column;
      int64_t tiles = 0;
      for (const Sequence& s : call.problem.sequences) tiles += (s.tk + kGradKeys - 1) / kGradKeys;
      shape[rank - 3] = call.packed ? tiles : (call.k_total + kGradKeys - 1) / kGradKeys;
    } else {
      kind = Partial::element;
    }
    partial = torch::stable::new_zeros(value, shape, ScalarType::Float);
    data = static_cast<float*>(partial.data_ptr());
  }

  Tensor reduced(const Tensor& c) const {
    std::vector<int64_t> axes;
    for (int64_t i = 0; i < c.dim(); ++i) {
      if (c.size(i) == 1 && partial.size(i) != 1) axes.push_back(i);
    }
    Tensor sum = partial;
    if (!axes.empty()) sum = torch::stable::sum(partial, axes, true, ScalarType::Double);
    return torch::stable::to(sum, c.scalar_type());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const MaybeTensor& grad_mixed, const Tensor& q,
    const Tensor& k, const MaybeTensor& v, const MaybeTensor& v_first, const MaybeTensor& lambda_v,
    const MaybeTensor& lambda_first, double lambda_v_value, double lambda_first_value,
    const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, int64_t window_left, int64_t window_right, double scale, double softcap,
    const MaybeTensor& sinks, const MaybeTensor& attn_bias, bool /*return_lse*/, bool /*return_mixed_value*/,
    const MaybeTensor& exclusive, double exclusive_value, double exclusive_eps, const MaybeTensor& out_gate,
    bool /*return_along*/, bool return_ungated, const Tensor& out, const Tensor& lse,
    const MaybeTensor& along, int64_t grad_mask) {
  const Tensor& any = v ? *v : *v_first;
  const Epilogue epilogue = read_epilogue(exclusive, exclusive_value, exclusive_eps, out_gate, q,
                                          any.size(any.dim() - 1), dtype_of(q, "q"));
  const Call call =
      read_call(q, k, v, v_first, lambda_v, lambda_first, lambda_v_value, lambda_first_value, cu_seqlens_q,
                cu_seqlens_k, window_left, window_right, scale, softcap, sinks, attn_bias, epilogue);
  const Problem& p = call.problem;
  auto wanted = [&](Gradient g, bool given) { return given && (grad_mask >> g & 1) != 0; };

  BackwardInput in;
  const Tensor grad = row_contiguous(grad_out);
  for (const Tensor* t : {&grad, &out}) {
    check_input(*t, t == &out ? "out" : "grad_out", q.dim(), q.scalar_type());
    for (int64_t i = 0; i + 1 < q.dim(); ++i) check_size(*t, t == &out ? "out" : "grad_out", i, q.size(i));
    check_size(*t, t == &out ? "out" : "grad_out", q.dim() - 1, p.dim_v);
  }
  in.grad_out = view_of(grad);
  in.out = view_of(out);
  Tensor mixed_grad;
  if (grad_mixed && grad_mixed->numel() > 0) {
    mixed_grad = row_contiguous(*grad_mixed);
    check_values(call, mixed_grad, "grad_mixed", k);
    in.grad_mixed = view_of(mixed_grad);
  }
  const std::vector<int64_t> rows = lse_shape(call);
  check_rows(lse, "lse", rows);
  STD_TORCH_CHECK(lse.is_contiguous(), "lse must be contiguous");
  in.lse = static_cast<const float*>(lse.data_ptr());
  lse_strides(call, in.lse_stride);
  in.ungated = return_ungated;
  STD_TORCH_CHECK(along.has_value() == epilogue.excludes, "along must be given where something is excluded");
  if (along) {
    check_rows(*along, "along", rows);
    STD_TORCH_CHECK(along->is_contiguous(), "along must be contiguous");
    in.along = static_cast<const float*>(along->data_ptr());
  }
  if (grad_lse && grad_lse->numel() > 0) {
    check_rows(*grad_lse, "grad_lse", rows);
    in.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
    for (int i = 0; i < 3; ++i)
      in.grad_lse_stride[i] = call.packed && i == 0 ? 0 : grad_lse->stride(i - (call.packed ? 1 : 0));
  }

  BackwardOutput o;
  auto leaf = [&](Gradient g, const MaybeTensor& t, View* view) {
    if (!wanted(g, t.has_value())) return output(q, {0}, q.scalar_type());
    Tensor result = output(q, shape_of(*t), q.scalar_type());
    if (call.packed) torch::stable::zero_(result);  // tokens past the last sequence have no gradient
    *view = view_of(result);
    return result;
  };
  Tensor dq = leaf(kQ, q, &o.dq), dk = leaf(kK, k, &o.dk), dv = leaf(kV, v, &o.dv),
         dv1 = leaf(kVFirst, v_first, &o.dv_first);
  const bool mixes = v && v_first;
  const CoefficientGradient cv(mixes && wanted(kLambdaV, true) ? lambda_v : std::nullopt, any, call);
  const CoefficientGradient cf(mixes && wanted(kLambdaFirst, true) ? lambda_first : std::nullopt, any, call);
  o.lambda_v_partial = cv.kind;
  o.lambda_v = cv.data;
  o.lambda_first_partial = cf.kind;
  o.lambda_first = cf.data;
  const CoefficientGradient ce(wanted(kExclusive, true) ? exclusive : std::nullopt, out, call, false);
  const CoefficientGradient cg(wanted(kOutGate, true) ? out_gate : std::nullopt, out, call, false);
  const bool by_channel = epilogue.excludes && !epilogue.gate.uniform_in_row();
  STD_TORCH_CHECK(return_ungated || (cg.kind == Partial::none && !by_channel),
                  "the gradient needs the output before the gate");
  o.exclusive = ce.data;
  o.gate = cg.data;
  o.gate_rows = cg.kind == Partial::row;
  Tensor sink_rows, bias_grad;
  const bool want_sinks = wanted(kSinks, sinks.has_value());
  if (want_sinks) {
    sink_rows = torch::stable::new_zeros(q, rows, ScalarType::Float);
    o.sinks = static_cast<float*>(sink_rows.data_ptr());
  }
  const bool want_bias = wanted(kBias, attn_bias.has_value()) && p.bias.kind == Bias::Kind::additive;
  if (want_bias) {
    const std::vector<int64_t> shape = shape_of(*attn_bias);
    const bool sums = attn_bias->numel() < call.batch * p.heads_q * call.q_total * call.k_total;
    bias_grad = torch::stable::new_zeros(q, shape, sums ? ScalarType::Double : ScalarType::Float);
    if (sums) {
      o.bias.sums = static_cast<double*>(bias_grad.data_ptr());
    } else {
      o.bias.data = static_cast<float*>(bias_grad.data_ptr());
    }
    for (int i = 0; i < 4; ++i) o.bias.stride[i] = attn_bias->size(i) == 1 ? 0 : bias_grad.stride(i);
    o.bias_shared = attn_bias->size(0) < call.batch || attn_bias->size(1) < p.heads_q;
  }
  current_attention_kernels().backward(p, in, o);

  auto none = [&](const MaybeTensor& t) { return output(q, {0}, t ? t->scalar_type() : ScalarType::Float); };
  Tensor dlambda_v = cv.kind == Partial::none ? none(lambda_v) : cv.reduced(*lambda_v);
  Tensor dlambda_first = cf.kind == Partial::none ? none(lambda_first) : cf.reduced(*lambda_first);
  Tensor dsinks = none(sinks), dbias = none(attn_bias);
  if (want_sinks) {
    const std::vector<int64_t> axes = call.packed ? std::vector<int64_t>{1} : std::vector<int64_t>{0, 2};
    const Tensor sum = torch::stable::sum(sink_rows, axes, false, ScalarType::Double);
    dsinks = torch::stable::to(sum, sinks->scalar_type());
  }
  if (want_bias) dbias = torch::stable::to(bias_grad, attn_bias->scalar_type());
  Tensor dexclusive = ce.kind == Partial::none ? none(exclusive) : ce.reduced(*exclusive);
  Tensor dgate = cg.kind == Partial::none ? none(out_gate) : cg.reduced(*out_gate);
  return {dq, dk, dv, dv1, dlambda_v, dlambda_first, dsinks, dbias, dexclusive, dgate};
}

}  // namespace
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("value_residual_attention_forward", TORCH_BOX(&resformer::forward));
  m.impl("value_residual_attention_backward", TORCH_BOX(&resformer::backward));
}
