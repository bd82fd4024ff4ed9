// The op boundary: checks, conversion of tensors to plain data, dispatch over instruction sets. Nothing is
// written to the caches before every check has passed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/tensor_args.h"
#include "kvcache/kvcache.h"

namespace resformer {

RESFORMER_DISPATCH(CacheKernels, kvcache_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

View view_of(const Tensor& t) {
  View v;
  v.data = t.data_ptr();
  for (int i = 0; i < 4; ++i) v.stride[i] = t.stride(i);
  return v;
}

struct Call {
  CacheProblem problem;
  int64_t batch = 0, capacity = 0;
  Tensor sinks_float;
};

// The rows that a call appends, or none.
struct Added {
  const MaybeTensor& tensor;
  const char* name;
  const MaybeTensor& offsets;
};

View packed_view(const Tensor& t) {
  View v = view_of(t);
  v.stride[0] = 0;
  return v;
}

CacheSide read_side(const Call& call, const Tensor& cache, const char* name, const Added& added,
                    const MaybeTensor& scale, const Tensor& q) {
  const CacheProblem& p = call.problem;
  CacheSide side;
  side.cache = view_of(cache);
  side.dim = cache.size(3);
  if (added.tensor) {
    const Tensor& t = *added.tensor;
    check_input(t, added.name, 4, q.scalar_type());
    check_size(t, added.name, 0, added.offsets ? 1 : call.batch);
    check_size(t, added.name, 2, p.heads_kv);
    check_size(t, added.name, 3, side.dim);
    side.added = added.offsets ? packed_view(t) : view_of(t);
  }
  STD_TORCH_CHECK(scale.has_value() == p.quantised, name, ": an int8 cache comes with scales, others do not");
  if (scale) {
    STD_TORCH_CHECK(scale->is_cpu() && scale->dim() == 3 && scale->scalar_type() == ScalarType::Float,
                    "the scales of ", name, " must be a 3-D float32 CPU tensor");
    for (int i = 0; i < 3; ++i) {
      check_size(*scale, "scales", i, cache.size(i));
      side.scale_stride[i] = scale->stride(i);
    }
    side.scale = static_cast<float*>(scale->data_ptr());
  }
  return side;
}

// A table, or contiguous numbers, with a row for each sequence.
void check_rows(const Tensor& t, const char* name, const char* kind, ScalarType dtype, int64_t rank,
                int64_t batch) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == rank && t.scalar_type() == dtype && t.size(0) == batch &&
                      (rank > 1 || t.is_contiguous()),
                  name, " must be ", kind, " CPU tensor with ", rank, " axes and ", batch, " rows");
}

BlockTable read_table(Call& call, const Tensor& table, const char* name, const Tensor& cache) {
  check_rows(table, name, "an int32", ScalarType::Int, 2, call.batch);
  BlockTable found;
  static const int32_t none = 0;
  found.pages = table.numel() == 0 ? &none : static_cast<const int32_t*>(table.data_ptr());
  for (int i = 0; i < 2; ++i) found.stride[i] = table.stride(i);
  found.page_size = cache.size(1);
  call.capacity = std::min(call.capacity, table.size(1) * found.page_size);
  return found;
}

// Reads the rows of each sequence: `rows` each, or where packed those between offsets within `rows`.
template <class Set>
void read_times(const Call& call, const char* name, const MaybeTensor& offsets, int64_t rows,
                const Set& set) {
  const int32_t* packed = nullptr;
  if (offsets) {
    check_rows(*offsets, name, "a contiguous int32", ScalarType::Int, 1, call.batch + 1);
    packed = static_cast<const int32_t*>(offsets->data_ptr());
  }
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t first = packed ? packed[b] : 0, end = packed ? packed[b + 1] : rows;
    STD_TORCH_CHECK(first >= 0 && first <= end && end <= rows, name, " has ", first, " and then ", end,
                    " at index ", b, ", takes 0 to ", rows, " in order");
    set(b, TimeRange{first, end - first});
  }
}

void check_pages(const CacheSide& side, int64_t pages, const char* name, int64_t b, int64_t length) {
  const BlockTable& t = side.table;
  for (int64_t i = 0; t.pages && i * t.page_size < length; ++i) {
    const int32_t page = t.pages[b * t.stride[0] + i * t.stride[1]];
    STD_TORCH_CHECK(page >= 0 && page < pages, name, " names page ", page, " for page ", i, " of sequence ",
                    b, ", takes 0 to ", pages - 1);
  }
}

// Reads the lengths, and checks the page numbers that they reach.
void read_sequences(Call& call, const Tensor& lengths, int64_t key_pages, int64_t value_pages,
                    const char* value_table) {
  CacheProblem& p = call.problem;
  check_rows(lengths, "cache_seqlens", "a contiguous int32", ScalarType::Int, 1, call.batch);
  const int32_t* before = static_cast<const int32_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < call.batch; ++b) {
    CacheSequence& s = p.sequences[b];
    s.length = before[b] + s.added.count;
    STD_TORCH_CHECK(before[b] >= 0 && s.length <= call.capacity, "sequence ", b, " has ", before[b],
                    " tokens and ", s.added.count, " are appended, the cache's capacity is ", call.capacity);
    check_pages(p.keys, key_pages, "block_table", b, s.length);
    check_pages(p.values, value_pages, value_table, b, s.length);
    s.last = s.length;
  }
}

// Zeros, and an LSE of -inf, for the rows of packed queries after the last sequence.
void clear_tail(const CacheProblem& p, int64_t rows) {
  const TimeRange last = p.sequences.empty() ? TimeRange{} : p.sequences.back().queries;
  const int64_t bytes = p.dtype == DType::float32 ? 4 : 2;
  for (int64_t t = last.first + last.count; t < rows; ++t) {
    for (int64_t h = 0; h < p.heads_q; ++h) {
      char* row = static_cast<char*>(p.out.data) + (t * p.out.stride[1] + h * p.out.stride[2]) * bytes;
      memset(row, 0, p.values.dim * bytes);
      if (p.lse) p.lse[h * p.lse_stride[1] + t] = -std::numeric_limits<float>::infinity();
    }
  }
}

// Narrows each sequence to its unmasked keys: padding then costs nothing.
void read_mask(Call& call, const Tensor& mask) {
  CacheProblem& p = call.problem;
  check_rows(mask, "key_mask", "a bool", ScalarType::Bool, 2, call.batch);
  static const uint8_t none = 0;
  p.mask = mask.numel() == 0 ? &none : static_cast<const uint8_t*>(mask.data_ptr());
  for (int i = 0; i < 2; ++i) p.mask_stride[i] = mask.stride(i);
  for (int64_t b = 0; b < call.batch; ++b) {
    CacheSequence& s = p.sequences[b];
    const uint8_t* row = p.mask + b * p.mask_stride[0];
    s.last = std::min(s.last, mask.size(1));
    while (s.first < s.last && !row[s.first * p.mask_stride[1]]) ++s.first;
    while (s.last > s.first && !row[(s.last - 1) * p.mask_stride[1]]) --s.last;
  }
}

Tensor read_out(const MaybeTensor& given, const Tensor& q, const std::vector<int64_t>& shape) {
  if (!given) return output(q, shape, q.scalar_type());
  check_input(*given, "out", 4, q.scalar_type());
  for (int i = 0; i < 4; ++i) check_size(*given, "out", i, shape[i]);
  return *given;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const MaybeTensor& k, const MaybeTensor& v, const Tensor& cache_seqlens,
                                  const MaybeTensor& block_table, const MaybeTensor& v_block_table,
                                  const MaybeTensor& cu_seqlens_q, int64_t max_seqlen_q,
                                  const MaybeTensor& cu_seqlens_k_new, const MaybeTensor& key_mask,
                                  int64_t window_left, int64_t window_right, double scale, double softcap,
                                  const MaybeTensor& sinks, const MaybeTensor& k_scale,
                                  const MaybeTensor& v_scale, int64_t num_splits, bool return_lse,
                                  const MaybeTensor& out, const MaybeTensor& exclusive,
                                  double exclusive_value, double exclusive_eps, const MaybeTensor& out_gate) {
  (void)max_seqlen_q;  // units follow the queries that each sequence has
  Call call;
  CacheProblem& p = call.problem;
  check_input(q, "q", 4, q.scalar_type());
  p.dtype = dtype_of(q, "q");
  p.quantised = k_cache.scalar_type() == ScalarType::Char;
  const ScalarType stored = p.quantised ? ScalarType::Char : q.scalar_type();
  check_input(k_cache, "k_cache", 4, stored);
  check_input(v_cache, "v_cache", 4, stored);
  call.batch = cache_seqlens.size(0);
  call.capacity = k_cache.size(1);
  p.heads_q = q.size(2);
  p.heads_kv = k_cache.size(2);
  STD_TORCH_CHECK(p.heads_kv > 0 && p.heads_q > 0 && p.heads_q % p.heads_kv == 0,
                  "q's heads must be a multiple of k_cache's, got ", p.heads_q, " and ", p.heads_kv);
  p.group = p.heads_q / p.heads_kv;
  check_size(q, "q", 0, cu_seqlens_q ? 1 : call.batch);
  check_size(k_cache, "k_cache", 3, q.size(3));
  for (int i = v_block_table ? 1 : 0; i < 3; ++i) check_size(v_cache, "v_cache", i, k_cache.size(i));
  STD_TORCH_CHECK(!k || !v || k->size(1) == v->size(1), "k and v must have equally many tokens");
  p.keys = read_side(call, k_cache, "k_cache", {k, "k", cu_seqlens_k_new}, k_scale, q);
  p.values = read_side(call, v_cache, "v_cache", {v, "v", cu_seqlens_k_new}, v_scale, q);
  STD_TORCH_CHECK(p.keys.dim > 0 && p.values.dim > 0, "head dims must be at least 1");
  if (block_table) {
    call.capacity = std::numeric_limits<int64_t>::max();
    p.keys.table = read_table(call, *block_table, "block_table", k_cache);
    p.values.table =
        v_block_table ? read_table(call, *v_block_table, "v_block_table", v_cache) : p.keys.table;
  } else {
    STD_TORCH_CHECK(!v_block_table, "v_block_table comes with block_table");
    check_size(k_cache, "k_cache", 0, call.batch);
  }
  STD_TORCH_CHECK(window_left >= -1 && window_right >= -1, "window must be -1 or more on both sides");
  STD_TORCH_CHECK(softcap >= 0.0, "softcap must be 0 or more, got ", softcap);
  STD_TORCH_CHECK(num_splits >= 0 && num_splits <= 1024, "num_splits must be 0 to 1024, got ", num_splits);
  p.window_left = window_left;
  p.window_right = window_right;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.splits = num_splits;
  p.epilogue = read_epilogue(exclusive, exclusive_value, exclusive_eps, out_gate, q, p.values.dim, p.dtype);
  p.sequences.resize(call.batch);
  const int64_t added = k ? k->size(1) : v ? v->size(1) : 0;
  read_times(call, "cu_seqlens_q", cu_seqlens_q, q.size(1),
             [&](int64_t b, const TimeRange& range) { p.sequences[b].queries = range; });
  read_times(call, "cu_seqlens_k_new", cu_seqlens_k_new, added,
             [&](int64_t b, const TimeRange& range) { p.sequences[b].added = range; });
  read_sequences(call, cache_seqlens, k_cache.size(0), v_cache.size(0),
                 v_block_table ? "v_block_table" : "block_table");
  if (key_mask) read_mask(call, *key_mask);
  if (sinks) {
    STD_TORCH_CHECK(sinks->is_cpu() && sinks->dim() == 1 && sinks->size(0) == p.heads_q,
                    "sinks must be (Hq,) = (", p.heads_q, ",) on the CPU");
    dtype_of(*sinks, "sinks");
    call.sinks_float = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
    p.sinks = static_cast<const float*>(call.sinks_float.data_ptr());
  }
  const std::vector<int64_t> none{0};
  const Tensor result = read_out(out, q, {q.size(0), q.size(1), p.heads_q, p.values.dim});
  Tensor lse =
      output(q, return_lse ? std::vector<int64_t>{q.size(0), p.heads_q, q.size(1)} : none, ScalarType::Float);
  p.q = cu_seqlens_q ? packed_view(q) : view_of(q);
  p.out = cu_seqlens_q ? packed_view(result) : view_of(result);
  if (return_lse) {
    p.lse = static_cast<float*>(lse.data_ptr());
    p.lse_stride[0] = cu_seqlens_q ? 0 : p.heads_q * q.size(1);
    p.lse_stride[1] = q.size(1);
  }
  current_kvcache_kernels().append(p);
  current_kvcache_kernels().attend(p);
  if (cu_seqlens_q) clear_tail(p, q.size(1));
  return {out ? output(q, none, q.scalar_type()) : result, lse};
}

}  // namespace
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("attention_with_kvcache", TORCH_BOX(&resformer::attend));
}
