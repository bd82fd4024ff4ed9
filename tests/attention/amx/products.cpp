// The products of gemm_amx.h for a test to call.
#include "common/gemm.h"

namespace {

using namespace resformer::RESFORMER_ISA;

Columns columns_of(const float* b, int64_t k, int64_t columns, bool packed) {
  return packed ? packed_panels(b, k, columns) : row_major(b, columns);
}

}  // namespace

extern "C" void amx_scores(const float* a, int64_t a_row, const float* b, int64_t k, int64_t columns,
                           bool packed, int64_t rows, const int32_t* spans, float alpha, float* c,
                           int64_t c_row) {
  const Bf16Tile::Session session;
  gemm_scores<Bf16Tile>(a, a_row, columns_of(b, k, columns, packed), k, rows,
                        reinterpret_cast<const Span*>(spans), alpha, c, c_row);
}

extern "C" void amx_accumulate(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t k,
                               int64_t columns, bool packed, int64_t rows, const int32_t* spans, float* c,
                               int64_t c_row) {
  const Bf16Tile::Session session;
  gemm_accumulate<Bf16Tile>(a, a_row, a_k, columns_of(b, k, columns, packed), rows,
                            reinterpret_cast<const Span*>(spans), c, c_row);
}

// One tile product, C += A B: 16 rows of 16 words each.
extern "C" void amx_tile(const float* a, const float* b, float* c) {
  const Bf16Tile::Session session;
  constexpr int64_t kStride = amx::kWords * sizeof(float);
  amx::load<0>(c, kStride);
  amx::load<amx::kA>(a, kStride);
  amx::load<amx::kB>(b, kStride);
  amx::dot<0, amx::kA, amx::kB>();
  amx::store<0>(c, kStride);
}

extern "C" void amx_tile_of_no_session(float* c) { amx::load<0>(c, amx::kWords * sizeof(float)); }
