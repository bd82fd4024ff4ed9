// The op boundary: checks, conversion of tensors to plain data, dispatch over instruction sets. Nothing is
// written to the caches before every check has passed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
  int64_t batch = 0, capacity = 0, pages = 0;
  Tensor sinks_float;
};

CacheSide read_side(const Call& call, const Tensor& cache, const char* name, const MaybeTensor& added,
                    const char* added_name, const MaybeTensor& scale, const Tensor& q) {
  const CacheProblem& p = call.problem;
  CacheSide side;
  side.cache = view_of(cache);
  side.dim = cache.size(3);
  if (added) {
    check_input(*added, added_name, 4, q.scalar_type());
    const int64_t sizes[4] = {call.batch, p.added, p.heads_kv, side.dim};
    for (int i = 0; i < 4; ++i) check_size(*added, added_name, i, sizes[i]);
    side.added = view_of(*added);
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

void read_table(Call& call, const Tensor& table, const Tensor& k_cache) {
  check_rows(table, "block_table", "an int32", ScalarType::Int, 2, call.batch);
  CacheProblem& p = call.problem;
  static const int32_t none = 0;
  p.table = table.numel() == 0 ? &none : static_cast<const int32_t*>(table.data_ptr());
  for (int i = 0; i < 2; ++i) p.table_stride[i] = table.stride(i);
  p.page_size = k_cache.size(1);
  call.pages = k_cache.size(0);
  call.capacity = table.size(1) * p.page_size;
}

// Reads the lengths, and checks the page numbers that they reach.
void read_sequences(Call& call, const Tensor& lengths) {
  CacheProblem& p = call.problem;
  check_rows(lengths, "cache_seqlens", "a contiguous int32", ScalarType::Int, 1, call.batch);
  const int32_t* before = static_cast<const int32_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < call.batch; ++b) {
    CacheSequence s;
    s.length = before[b] + p.added;
    STD_TORCH_CHECK(before[b] >= 0 && s.length <= call.capacity, "sequence ", b, " has ", before[b],
                    " tokens and ", p.added, " are appended, the cache's capacity is ", call.capacity);
    if (p.table) {
      for (int64_t i = 0; i * p.page_size < s.length; ++i) {
        const int32_t page = p.table[b * p.table_stride[0] + i * p.table_stride[1]];
        STD_TORCH_CHECK(page >= 0 && page < call.pages, "block_table names page ", page, " for page ", i,
                        " of sequence ", b, ", takes 0 to ", call.pages - 1);
      }
    }
    s.last = s.length;
    p.sequences.push_back(s);
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

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const MaybeTensor& k, const MaybeTensor& v, const Tensor& cache_seqlens,
                                  const MaybeTensor& block_table, const MaybeTensor& key_mask,
                                  int64_t window_left, int64_t window_right, double scale, double softcap,
                                  const MaybeTensor& sinks, const MaybeTensor& k_scale,
                                  const MaybeTensor& v_scale, int64_t num_splits, bool return_lse) {
  Call call;
  CacheProblem& p = call.problem;
  check_input(q, "q", 4, q.scalar_type());
  p.dtype = dtype_of(q, "q");
  p.quantised = k_cache.scalar_type() == ScalarType::Char;
  const ScalarType stored = p.quantised ? ScalarType::Char : q.scalar_type();
  check_input(k_cache, "k_cache", 4, stored);
  check_input(v_cache, "v_cache", 4, stored);
  call.batch = q.size(0);
  call.capacity = k_cache.size(1);
  p.queries = q.size(1);
  p.heads_q = q.size(2);
  p.heads_kv = k_cache.size(2);
  STD_TORCH_CHECK(p.heads_kv > 0 && p.heads_q > 0 && p.heads_q % p.heads_kv == 0,
                  "q's heads must be a multiple of k_cache's, got ", p.heads_q, " and ", p.heads_kv);
  p.group = p.heads_q / p.heads_kv;
  check_size(k_cache, "k_cache", 3, q.size(3));
  for (int i = 0; i < 3; ++i) check_size(v_cache, "v_cache", i, k_cache.size(i));
  p.added = k ? k->size(1) : v ? v->size(1) : 0;
  if (block_table) {
    read_table(call, *block_table, k_cache);
  } else {
    check_size(k_cache, "k_cache", 0, call.batch);
  }
  p.keys = read_side(call, k_cache, "k_cache", k, "k", k_scale, q);
  p.values = read_side(call, v_cache, "v_cache", v, "v", v_scale, q);
  STD_TORCH_CHECK(p.keys.dim > 0 && p.values.dim > 0, "head dims must be at least 1");
  STD_TORCH_CHECK(window_left >= -1 && window_right >= -1, "window must be -1 or more on both sides");
  STD_TORCH_CHECK(softcap >= 0.0, "softcap must be 0 or more, got ", softcap);
  STD_TORCH_CHECK(num_splits >= 0 && num_splits <= 1024, "num_splits must be 0 to 1024, got ", num_splits);
  p.window_left = window_left;
  p.window_right = window_right;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.splits = num_splits;
  read_sequences(call, cache_seqlens);
  if (key_mask) read_mask(call, *key_mask);
  if (sinks) {
    STD_TORCH_CHECK(sinks->is_cpu() && sinks->dim() == 1 && sinks->size(0) == p.heads_q,
                    "sinks must be (Hq,) = (", p.heads_q, ",) on the CPU");
    dtype_of(*sinks, "sinks");
    call.sinks_float = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
    p.sinks = static_cast<const float*>(call.sinks_float.data_ptr());
  }
  p.q = view_of(q);
  Tensor out = output(q, {call.batch, p.queries, p.heads_q, p.values.dim}, q.scalar_type());
  Tensor lse =
      output(q, return_lse ? std::vector<int64_t>{call.batch, p.heads_q, p.queries} : std::vector<int64_t>{0},
             ScalarType::Float);
  p.out = view_of(out);
  if (return_lse) p.lse = static_cast<float*>(lse.data_ptr());
  current_kvcache_kernels().append(p);
  current_kvcache_kernels().attend(p);
  return {out, lse};
}

}  // namespace
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("attention_with_kvcache", TORCH_BOX(&resformer::attend));
}
