// Working memory of a thread: rows of q, sums and scores of its unit, and two blocks of keys.
#pragma once

#include "common/parallel.h"
#include "common/rows.h"
#include "common/softmax.h"
#include "kvcache/block.h"
#include "kvcache/result.h"
#include "kvcache/stream_softmax.h"
#include "kvcache/tile.h"

namespace resformer::RESFORMER_ISA {

// T: dtype of q and out. C: elements of the cache. Dot: products of words of q.
template <class T, class C, class Dot>
struct WorkerScratch {
  WorkerScratch(const CacheProblem& p, const CachePlan& plan)
      : rows(plan.most([](const CacheTiling& t) { return t.heads * padded(t.rows); })),
        q(rows * row_words<Dot>(p.keys.dim)),
        acc(rows * plan.columns()),
        scores(plan.most([](const CacheTiling& t) { return score_rows(t) * t.tokens; })),
        stream_sums(plan.most(
            [](const CacheTiling& t) { return t.streams ? StreamState::floats(score_rows(t)) : 0; })),
        key_rows(kLanes * row_words<Dot>(p.keys.dim)),
        panels(plan.most([](const CacheTiling& t) { return t.streams ? 0 : t.tokens; }) *
               row_words<Dot>(p.keys.dim)),
        scales(p.quantised ? plan.most([](const CacheTiling& t) { return score_rows(t) * t.tokens; }) : 0),
        zeros(p.values.dim),
        states(rows * sizeof(RowState) / sizeof(float)),
        result(p) {
    memset(zeros.get(), 0, p.values.dim * sizeof(float));
    state = reinterpret_cast<RowState*>(states.get());
  }
  static int64_t score_rows(const CacheTiling& t) { return round_up(t.heads * padded(t.rows), 16); }

  int64_t rows;
  Scratch q, acc, scores, stream_sums, key_rows, panels, scales, zeros, states;
  typename CacheResult<T, C>::Rows result;
  RowState* state;
  Block<C> blocks[2];
  Block<C>*now = &blocks[0], *next = &blocks[1];
  bool filled = false;  // whether `now` already holds the first block of the next unit
  // Range of keys visible to each row of the unit: positions, and indices within a block.
  int64_t from[kUnitRows + 1], to[kUnitRows + 1], lo[kUnitRows + 1], hi[kUnitRows + 1];
};

}  // namespace resformer::RESFORMER_ISA
