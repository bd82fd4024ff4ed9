// The kernels of attention_with_kvcache, compiled once per instruction set (see build_support/native.py).
#include "kvcache/append.h"
#include "kvcache/attend.h"

namespace resformer::RESFORMER_ISA {
namespace {

template <class Body>
void by_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(float());
    case DType::bfloat16:
      return body(bf16());
    case DType::float16:
      return body(f16());
  }
}

#if defined(RESFORMER_ISA_AVX512_BF16)
template <class T>
using Products = std::conditional_t<std::is_same_v<T, bf16>, Pairs, Widened<T>>;
#else
template <class T>
using Products = Widened<T>;
#endif

void append_tokens(const CacheProblem& p) {
  by_dtype(p.dtype, [&](auto element) { Append<decltype(element)>(p).run(); });
}

void attend_cache(const CacheProblem& p) {
  by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.quantised) return CacheAttend<T, Widened<int8_t>>(p).run();
    CacheAttend<T, Products<T>>(p).run();
  });
}

}  // namespace

extern const CacheKernels kvcache_kernels = {append_tokens, attend_cache};

}  // namespace resformer::RESFORMER_ISA
