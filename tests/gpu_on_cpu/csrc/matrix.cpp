// Instructions of one warp on small matrices: ldmatrix, stmatrix, movmatrix and mma.
#include <array>

#include "access.h"
#include "fragments.h"

namespace gpu {
namespace {

constexpr uint32_t ROW_BYTES = 16;                // of a matrix of 8 x 8 elements of 16 bits
constexpr uint32_t MATRIX_BYTES = 8 * ROW_BYTES;  // as many as a row of 32-bit registers has

using Matrix = std::array<uint16_t, 64>;

Matrix transposed(const Matrix& given) {
  Matrix to;
  for (uint32_t i = 0; i < 8; ++i)
    for (uint32_t j = 0; j < 8; ++j) to[i * 8 + j] = given[j * 8 + i];
  return to;
}

// Element (i, j) of a matrix is in lane 4 i + j / 2, so that a row of registers is the matrix row by row.
void load(const Warp& warp, Row row, Matrix* to) { std::memcpy(to, warp.frame + row, MATRIX_BYTES); }
void store(const Warp& warp, Row row, const Matrix& from) {
  std::memcpy(warp.frame + row, &from, MATRIX_BYTES);
}

struct Rows {      // of ldmatrix and stmatrix
  uint32_t count;  // of matrices
  bool transposed;
  Space space;
  Address address;  // of the matrix row of its number, in each lane
};

// rows: registers, address.
Outcome load_matrices(Warp& warp, const Instruction& at) {
  if (!whole_warp(warp)) return Outcome::waits;
  const Rows& plan = *static_cast<const Rows*>(at.more);
  Memory& memory = *warp.block->machine->memory;
  const Access access = access_of(warp, at);
  Matrix found[4];
  for (uint32_t lane = 0; lane < plan.count * 8; ++lane)
    memory.read(access, plan.space, aligned_address(warp, plan.address, ROW_BYTES, lane), ROW_BYTES, lane,
                &found[lane / 8][lane % 8 * 8]);
  for (uint32_t i = 0; i < plan.count; ++i)
    store(warp, at.rows[i], plan.transposed ? transposed(found[i]) : found[i]);
  return Outcome::next;
}

// rows: address, registers.
Outcome store_matrices(Warp& warp, const Instruction& at) {
  if (!whole_warp(warp)) return Outcome::waits;
  const Rows& plan = *static_cast<const Rows*>(at.more);
  Memory& memory = *warp.block->machine->memory;
  const Access access = access_of(warp, at);
  Matrix given[4];
  for (uint32_t i = 0; i < plan.count; ++i) {
    load(warp, at.rows[1 + i], &given[i]);
    if (plan.transposed) given[i] = transposed(given[i]);
  }
  for (uint32_t lane = 0; lane < plan.count * 8; ++lane)
    memory.write(access, plan.space, aligned_address(warp, plan.address, ROW_BYTES, lane), ROW_BYTES, lane,
                 &given[lane / 8][lane % 8 * 8]);
  ++warp.block->machine->events;
  return Outcome::next;
}

Outcome move_matrix(Warp& warp, const Instruction& at) {
  if (!whole_warp(warp)) return Outcome::waits;
  Matrix matrix;
  load(warp, at.rows[1], &matrix);
  store(warp, at.rows[0], transposed(matrix));
  return Outcome::next;
}

// rows: D, A, B, C.
Outcome multiply_matrices(Warp& warp, const Instruction& at) {
  if (!whole_warp(warp)) return Outcome::waits;
  const Product& p = *static_cast<const Product*>(at.more);
  const uint32_t sums = accumulator_rows(p), depth = p.k * bytes_of(p.a) / 16;
  const Row *a_rows = at.rows + sums, *b_rows = a_rows + p.m / 8 * depth, *c_rows = b_rows + depth;
  float a[16 * 32], b[32 * 8], c[16 * 8];
  load_operand(warp, a_rows, p.a, p.k, p.m / 8, p.k, 1, a);
  load_operand(warp, b_rows, p.b, p.k, 1, 1, 8, b);
  load_sums(warp, c_rows, p, c);
  multiply(p, a, b, c);
  store_sums(warp, at.rows, c_rows, p, c);
  return Outcome::next;
}

// Rows of the registers of an operand, a vector or one of them.
bool add_rows(const Operand& operand, Build& build, uint32_t count, std::vector<Row>* to) {
  const bool vector = operand.is == Operand::Is::vector;
  if ((vector ? operand.parts.size() : 1) != count) return false;
  for (uint32_t i = 0; i < count; ++i) to->push_back(build.row(vector ? operand.parts[i] : operand, 4));
  return true;
}

bool decode_rows(const Statement& given, Build& build, Instruction& to, bool stores) {
  if (!given.has("sync") || !given.has("aligned") || !given.has("m8n8") || !given.has("b16")) return false;
  const bool shared = given.has("shared") || given.has("shared::cta");
  auto plan = std::make_shared<Rows>();
  plan->count = given.has("x1") ? 1 : given.has("x2") ? 2 : given.has("x4") ? 4 : 0;
  plan->transposed = given.has("trans");
  plan->space = shared ? Space::shared : Space::generic;
  if (plan->count == 0 || given.operands.size() != 2) return false;
  const Operand &address = given.operands[stores ? 0 : 1], &registers = given.operands[stores ? 1 : 0];
  plan->address = address_of(address, build);
  std::vector<Row> rows;
  if (!add_rows(registers, build, plan->count, &rows)) return false;
  rows.insert(stores ? rows.begin() : rows.end(), plan->address.row);
  finish(build, to, stores ? store_matrices : load_matrices, stores ? 0 : plan->count, std::move(rows), {});
  to.more = build.keep(std::static_pointer_cast<void>(plan));
  return true;
}

bool decode_load(const Statement& given, Build& build, Instruction& to) {
  return decode_rows(given, build, to, false);
}

bool decode_store(const Statement& given, Build& build, Instruction& to) {
  return decode_rows(given, build, to, true);
}

bool decode_move(const Statement& given, Build& build, Instruction& to) {
  for (const char* part : {"sync", "aligned", "m8n8", "trans", "b16"})
    if (!given.has(part)) return false;
  if (given.operands.size() != 2) return false;
  finish(build, to, move_matrix, 1, rows_of(given, build, 4), {});
  return true;
}

// Whether a tensor core takes elements of these types in this shape.
bool has_shape(const Product& p) {
  const uint32_t bytes = p.k * bytes_of(p.a);  // of a row of A
  if (p.n != 8 || !(bytes == 16 || bytes == 32)) return false;
  if (is_integer(p.a)) return p.m == 16 || (p.m == 8 && bytes == 16);
  return p.m == 16 && (bytes_of(p.a) > 1 || bytes == 32);
}

// mma.sync.aligned.<shape>.row.col[.satfinite].<D>.<A>.<B>.<C>
bool decode_multiply(const Statement& given, Build& build, Instruction& to) {
  auto product = std::make_shared<Product>();
  const std::vector<std::string>& parts = given.parts;
  product->saturates = given.has("satfinite");
  const size_t types = product->saturates ? 7 : 6;
  if (parts.size() != types + 4 || !given.has("sync") || !given.has("aligned")) return false;
  if (parts[4] != "row" || parts[5] != "col" || parts[types] != parts[types + 3]) return false;
  if (!read_shape(parts[3], product.get())) return false;
  if (!read_types(parts[types], parts[types + 1], parts[types + 2], product.get())) return false;
  if (!has_shape(*product) || (product->saturates && product->sum != Sum::s32)) return false;
  for (const std::string& part : parts) given.has(part);
  const uint32_t sums = accumulator_rows(*product), depth = product->k * bytes_of(product->a) / 16;
  const uint32_t counts[] = {sums, product->m / 8 * depth, depth, sums};
  std::vector<Row> rows;
  if (given.operands.size() != std::size(counts)) return false;
  for (size_t i = 0; i < std::size(counts); ++i)
    if (!add_rows(given.operands[i], build, counts[i], &rows)) return false;
  finish(build, to, multiply_matrices, sums, std::move(rows), {});
  to.more = build.keep(std::static_pointer_cast<void>(product));
  return true;
}

}  // namespace

void add_matrix(Decoders& decoders) {
  decoders["ldmatrix"] = decode_load;
  decoders["stmatrix"] = decode_store;
  decoders["movmatrix"] = decode_move;
  decoders["mma"] = decode_multiply;
}

}  // namespace gpu
