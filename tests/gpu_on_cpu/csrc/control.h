// What decoders of several files share.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "decode.h"
#include "machine.h"

namespace gpu {

// Calls do_it(lane) for every lane of a mask, in order.
template <class DoIt>
void for_lanes(Mask lanes, DoIt&& do_it) {
  for (; lanes != 0; lanes &= lanes - 1) do_it(static_cast<uint32_t>(__builtin_ctz(lanes)));
}

inline void finish(Build& build, Instruction& to, Step step, uint32_t results, std::vector<Row> rows,
                   std::vector<int64_t> numbers) {
  to.step = step;
  to.results = results;
  to.row_count = static_cast<uint32_t>(rows.size());
  to.rows = build.keep(std::move(rows));
  to.numbers = build.keep(std::move(numbers));
}

// A row for each operand, all of one width.
inline std::vector<Row> rows_of(const Statement& given, Build& build, uint32_t width) {
  std::vector<Row> rows;
  for (const Operand& operand : given.operands) rows.push_back(build.row(operand, width));
  return rows;
}

// Rows of a result, or of a result and a predicate: "%r1|%p1"; "_" is NONE.
inline std::vector<Row> results_of(const Operand& given, Build& build, uint32_t width) {
  const auto row = [&](const Operand& operand) {
    return operand.is == Operand::Is::sink ? NONE : build.row(operand, width);
  };
  if (given.parts.size() != 2) return {row(given)};
  const Operand& second = given.parts[1];
  return {row(given.parts[0]), second.is == Operand::Is::sink ? NONE : build.predicate(second)};
}

}  // namespace gpu
