// resformer::mix_value_embedding_* on CPU tensors: v + gate * table[token_ids], rows read in place.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "mix/mix_gradients.h"

namespace resformer::mix_host {
namespace {

template <class Id>
void read_rows(const Tensor& token_ids, int64_t vocab, std::vector<int64_t>* rows) {
  const int64_t rank = token_ids.dim();
  const int64_t time = token_ids.size(rank - 1), outer = rank == 2 ? token_ids.stride(0) : 0;
  const int64_t inner = token_ids.stride(rank - 1);
  const Id* ids = static_cast<const Id*>(token_ids.const_data_ptr());
  for (size_t i = 0; i < rows->size(); ++i) {
    const int64_t id = ids[static_cast<int64_t>(i) / time * outer + static_cast<int64_t>(i) % time * inner];
    STD_TORCH_CHECK(id >= 0 && id < vocab, "token_ids holds ", id, ", but table has ", vocab, " rows");
    (*rows)[i] = id;
  }
}

std::vector<int64_t> checked_rows(const Tensor& token_ids, const Tensor& table, const Tensor& like) {
  STD_TORCH_CHECK(token_ids.is_cpu(), "token_ids must be a CPU tensor");
  bool fits = token_ids.dim() == like.dim() - 2;
  for (int64_t i = 0; fits && i < token_ids.dim(); ++i) fits = token_ids.size(i) == like.size(i);
  STD_TORCH_CHECK(fits, "token_ids must have v's leading shape");
  std::vector<int64_t> rows(token_ids.numel());
  if (token_ids.scalar_type() == ScalarType::Long) {
    read_rows<int64_t>(token_ids, table.size(0), &rows);
  } else {
    STD_TORCH_CHECK(token_ids.scalar_type() == ScalarType::Int, "token_ids must be int64 or int32");
    read_rows<int32_t>(token_ids, table.size(0), &rows);
  }
  return rows;
}

void check_table(const Tensor& table, const Tensor& like) {
  STD_TORCH_CHECK(table.is_cpu(), "table must be a CPU tensor");
  STD_TORCH_CHECK(table.dim() == 3, "table must have 3 dimensions, got ", table.dim());
  check_rows(table, "table");
  const int64_t rank = like.dim();
  STD_TORCH_CHECK(table.size(1) == like.size(rank - 2) && table.size(2) == like.size(rank - 1),
                  "table must have v's heads and head_dim");
  STD_TORCH_CHECK(table.scalar_type() == like.scalar_type() || table.scalar_type() == ScalarType::Float,
                  "table must be float32 or have v's dtype");
}

Tensor mix_value_embedding_forward(Tensor v, Tensor table, Tensor token_ids, std::optional<Tensor> gate,
                                   double gate_value, [[maybe_unused]] bool sparse_grad) {
  shape_of(v, "v");
  check_rows(v, "v");
  check_table(table, v);
  const std::vector<int64_t> rows = checked_rows(token_ids, table, v);
  std::vector<MixSource> sources{rows_of(v), table_rows_of(table, rows)};
  sources[1].coefficient = read_coefficient(gate, "gate", gate_value, v, sources[0].dtype);
  return run_forward(v, sources);
}

// Positions sorted by their id (a counting sort, so equal ids keep their order), and the ids that occur.
struct Segments {
  std::vector<int64_t> order, starts, ids;

  Segments(const std::vector<int64_t>& rows, int64_t vocab) : order(rows.size()) {
    std::vector<int64_t> next(vocab + 1);
    for (const int64_t row : rows) ++next[row + 1];
    for (int64_t id = 0; id < vocab; ++id) {
      if (next[id + 1] > 0) {
        ids.push_back(id);
        starts.push_back(next[id]);
      }
      next[id + 1] += next[id];
    }
    starts.push_back(static_cast<int64_t>(rows.size()));
    for (size_t i = 0; i < rows.size(); ++i) order[next[rows[i]]++] = static_cast<int64_t>(i);
  }

  int64_t count() const { return static_cast<int64_t>(ids.size()); }
};

// Segments grouped into tasks of about equal numbers of positions. A token so frequent that it would occupy
// one thread alone is split by head.
struct Parts {
  int64_t tasks, heads_each, head_parts, positions;
  const std::vector<int64_t>& starts;

  Parts(const Segments& segments, const MixShape& shape)
      : tasks(std::clamp<int64_t>(shape.rows() / rows_per_thread(shape), 1, 64)),
        heads_each(shape.heads),
        head_parts(1),
        positions(shape.rows()),
        starts(segments.starts) {
    int64_t longest = 0;
    for (int64_t i = 0; i < segments.count(); ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
    if (tasks > 1 && longest > positions / torch::stable::get_num_threads()) {
      heads_each = 1;
      head_parts = shape.heads;
    }
  }

  int64_t count() const { return tasks * head_parts; }
  int64_t segment(int64_t task) const {
    const int64_t position = positions * task / tasks;
    return std::lower_bound(starts.begin(), starts.end(), position) - starts.begin();
  }
};

struct EmbeddingBackward {
  EmbeddingBackward(const Tensor& grad, const Tensor& table, const Tensor& token_ids,
                    const std::optional<Tensor>& gate, double gate_value) {
    shape_of(grad, "grad");
    check_rows(grad, "grad");
    check_table(table, grad);
    rows = checked_rows(token_ids, table, grad);
    coefficient = read_coefficient(gate, "gate", gate_value, grad, dtype_of(grad, "grad"));
  }

  void scatter(const Tensor& grad, const Segments& segments, const int64_t* targets,
               const Tensor& out) const {
    MixShape shape = shape_of(grad, "grad");
    if (segments.count() * shape.heads * shape.dim == 0) return;
    MixSource source = rows_of(grad);
    source.coefficient = coefficient;
    const MixScatter s{dtype_of(grad, "grad"), shape,   source,           segments.order.data(),
                       segments.starts.data(), targets, segments.count(), dtype_of(out, "table"),
                       out.mutable_data_ptr()};
    const MixKernels& kernels = current_mix_kernels();
    const Parts parts(segments, shape);
    torch::stable::parallel_for(0, parts.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts.tasks, head = i / parts.tasks;
        kernels.scatter(s, parts.segment(part), parts.segment(part + 1), head * parts.heads_each,
                        (head + 1) * parts.heads_each);
      }
    });
  }

  std::vector<int64_t> rows;
  Coefficient coefficient;
};

// dv is grad itself, which an op may not return. Bit 0 of grad_mask: the table, bit 1: the gate.
std::tuple<Tensor, Tensor> mix_value_embedding_backward(Tensor grad, Tensor table, Tensor token_ids,
                                                        std::optional<Tensor> gate, double gate_value,
                                                        int64_t grad_mask) {
  const EmbeddingBackward call(grad, table, token_ids, gate, gate_value);
  Tensor table_gradient = absent_like(table), gate_gradient = absent_like(gate ? *gate : grad);
  if (grad_mask & 2) {
    STD_TORCH_CHECK(gate.has_value(), "grad_mask asks for the gradient of a gate that is no tensor");
    std::vector<MixSource> sources{table_rows_of(table, call.rows)};
    sources[0].coefficient = call.coefficient;
    BackwardRun run(grad, std::move(sources));
    run.want_coefficient(0, *gate);
    run.run();
    gate_gradient = run.coefficient_gradient(0);
  }
  if (grad_mask & 1) {
    const std::vector<int64_t> sizes = sizes_of(table);
    table_gradient = torch::stable::new_zeros(table, {sizes.data(), sizes.size()});
    const Segments segments(call.rows, table.size(0));
    call.scatter(grad, segments, segments.ids.data(), table_gradient);
  }
  return {table_gradient, gate_gradient};
}

// The table's gradient as (ids, rows): the ids that occur, ascending, and their rows.
std::tuple<Tensor, Tensor> mix_value_embedding_backward_sparse(Tensor grad, Tensor table, Tensor token_ids,
                                                               std::optional<Tensor> gate,
                                                               double gate_value) {
  const EmbeddingBackward call(grad, table, token_ids, gate, gate_value);
  const Segments segments(call.rows, table.size(0));
  const int64_t count = segments.count();
  Tensor ids = torch::stable::new_empty(grad, {count}, ScalarType::Long);
  if (count > 0) std::memcpy(ids.mutable_data_ptr(), segments.ids.data(), count * sizeof(int64_t));
  Tensor rows = fresh(table, {count, table.size(1), table.size(2)});
  std::vector<int64_t> targets(count);
  for (int64_t i = 0; i < count; ++i) targets[i] = i;
  call.scatter(grad, segments, targets.data(), rows);
  return {ids, rows};
}

}  // namespace
}  // namespace resformer::mix_host

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("mix_value_embedding_forward", TORCH_BOX(&resformer::mix_host::mix_value_embedding_forward));
  m.impl("mix_value_embedding_backward", TORCH_BOX(&resformer::mix_host::mix_value_embedding_backward));
  m.impl("mix_value_embedding_backward_sparse",
         TORCH_BOX(&resformer::mix_host::mix_value_embedding_backward_sparse));
}
