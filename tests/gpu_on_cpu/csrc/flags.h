// What releases hand to acquires, by the location that both of them use.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "causality.h"

namespace gpu {

enum class Order : uint8_t { weak, relaxed, acquire, release, acquire_release };
enum class Scope : uint8_t { cta, cluster, gpu, sys };

inline bool acquires(Order order) { return order == Order::acquire || order == Order::acquire_release; }
inline bool releases(Order order) { return order == Order::release || order == Order::acquire_release; }
// A cluster is one block here.
inline bool within_block(Scope scope) { return scope == Scope::cta || scope == Scope::cluster; }

class Flags {
 public:
  // A lane stores to a location, or changes it by an atomic: the latter hands on what was released there
  // before.
  void store(Warp& warp, uint64_t location, Order order, Scope scope, uint32_t lane, bool continues);
  // A lane reads it. Relaxed: what was released there counts after a fence.
  void load(Warp& warp, uint64_t location, Order order, Scope scope, uint32_t lane);
  // A weak store over it.
  void overwrite(uint64_t location) { released_.erase(location); }
  bool empty() const { return released_.empty(); }
  void fence(Warp& warp, Scope scope, Mask lanes);
  // Forgets the locations of memory that has ended.
  void forget(uint64_t first, uint64_t end);

 private:
  struct Released {
    View all;             // at the scope of the device,
    View block;           // and of a block
    uint32_t number = 0;  // of that block
  };
  struct Fence {
    Mask lanes;
    Scope scope;
    std::shared_ptr<const View> view;
  };
  struct Observed {
    Mask lanes;
    View all, block;  // for a fence at the scope of the device, and of a block
  };
  struct Fenced {                    // of a warp
    std::vector<Fence> fences;       // what its relaxed stores release
    std::vector<Observed> observed;  // what its relaxed loads saw
  };
  void release(Released& to, const View& view, Scope scope, uint32_t block);

  std::unordered_map<uint64_t, Released> released_;
  std::unordered_map<uint32_t, Fenced> fenced_;  // by the warp's number
};

}  // namespace gpu
