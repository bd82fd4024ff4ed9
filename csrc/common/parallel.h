// Dynamic scheduling on PyTorch's own thread pool (so that torch.set_num_threads holds).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

#include "common/poison.h"

// Each instruction set keeps its own copy (see simd.h); files without one share the plain namespace.
#if defined(RESFORMER_ISA)
namespace resformer::RESFORMER_ISA {
#else
namespace resformer {
#endif

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// 64-byte aligned scratch of floats; NaN-filled under RESFORMER_POISON so that a read before a write shows.
class Scratch {
 public:
  explicit Scratch(int64_t floats) { at_least(floats); }
  float* get() const { return data_.get(); }

  // Grows where needed; the contents are lost.
  float* at_least(int64_t floats) {
    if (floats > floats_) {
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
      data_.reset();  // before the new block is there: never two at a time
      floats_ = 0;
      data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      floats_ = floats;
    }
    if (poison_requested()) {
      for (int64_t i = 0; i < floats; ++i) data_.get()[i] = __builtin_nanf("");
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float, FreeDeleter> data_;
  int64_t floats_ = 0;
};

// Runs body(worker) once on each of `workers` threads. Exceptions must not cross the pool: the first one is
// kept and thrown from here.
template <class Body>
void parallel_workers(int64_t workers, const Body& body) {
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        body(worker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

// Each worker makes its scratch once with make(), then takes units from a shared counter: units may differ
// much in cost (causal tiles), and the thread that runs one never changes its bits.
template <class Make, class Body>
void parallel_units(int64_t units, const Make& make, const Body& body) {
  if (units <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  parallel_workers(units < threads ? units : threads, [&](int64_t) {
    auto scratch = make();  // first: it may throw, and a unit that was taken must be run
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (int64_t unit = take(); unit < units; unit = take()) body(unit, scratch);
  });
}

}  // namespace resformer
