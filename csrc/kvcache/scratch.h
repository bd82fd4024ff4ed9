// Working memory of a thread: rows of q, sums and scores of its unit, and two blocks of keys.
#pragma once

#include "common/parallel.h"
#include "common/rows.h"
#include "common/softmax.h"
#include "kvcache/block.h"
#include "kvcache/tile.h"

namespace resformer::RESFORMER_ISA {

// C: elements of the cache. Dot: products of words of q.
template <class C, class Dot>
struct WorkerScratch {
  WorkerScratch(const CacheProblem& p, const CachePlan& plan)
      : rows(plan.most_heads() * padded(plan.most_rows())),
        q(rows * row_words<Dot>(p.keys.dim)),
        acc(rows * plan.columns()),
        scores(larger(padded(plan.most_rows()), round_up(rows, 16)) * plan.tokens()),
        by_token(plan.streams() ? round_up(rows, 16) * plan.tokens() : 0),
        key_rows(plan.streams() ? 0 : kLanes * row_words<Dot>(p.keys.dim)),
        panels(plan.streams() ? 0 : plan.tokens() * row_words<Dot>(p.keys.dim)),
        scales(kMostTokens),
        zeros(p.values.dim),
        states(rows * sizeof(RowState) / sizeof(float)) {
    memset(zeros.get(), 0, p.values.dim * sizeof(float));
    state = reinterpret_cast<RowState*>(states.get());
  }
  int64_t rows;
  Scratch q, acc, scores, by_token, key_rows, panels, scales, zeros, states;
  RowState* state;
  Block<C> blocks[2];
  Block<C>*now = &blocks[0], *next = &blocks[1];
  bool filled = false;  // whether `now` already holds the first block of the next unit
  // Range of keys visible to each row of the unit: positions, and indices within a block.
  int64_t from[kUnitRows + 1], to[kUnitRows + 1], lo[kUnitRows + 1], hi[kUnitRows + 1];
};

}  // namespace resformer::RESFORMER_ISA
