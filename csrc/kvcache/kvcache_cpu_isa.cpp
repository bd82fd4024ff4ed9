// The kernels of attention_with_kvcache, compiled once per instruction set (see build_support/native.py).
#include "kvcache/append.h"
#include "kvcache/attend.h"

namespace resformer::RESFORMER_ISA {
namespace {

void append_tokens(const CacheProblem& p) {
  switch (p.dtype) {
    case DType::float32:
      return Append<float>(p).run();
    case DType::bfloat16:
      return Append<bf16>(p).run();
    case DType::float16:
      return Append<f16>(p).run();
  }
}

void attend_codes(const CacheProblem& p) {
  switch (p.dtype) {
    case DType::float32:
      return CacheAttend<float, Widened<int8_t>>(p).run();
    case DType::bfloat16:
      return CacheAttend<bf16, Widened<int8_t>>(p).run();
    case DType::float16:
      return CacheAttend<f16, Widened<int8_t>>(p).run();
  }
}

void attend_cache(const CacheProblem& p) {
  if (p.quantised) return attend_codes(p);
  switch (p.dtype) {
    case DType::float32:
      return CacheAttend<float, Widened<float>>(p).run();
    case DType::bfloat16:
#if defined(RESFORMER_ISA_AVX512_BF16)
      return CacheAttend<bf16, Pairs>(p).run();
#else
      return CacheAttend<bf16, Widened<bf16>>(p).run();
#endif
    case DType::float16:
      return CacheAttend<f16, Widened<f16>>(p).run();
  }
}

}  // namespace

extern const CacheKernels kvcache_kernels = {append_tokens, attend_cache};

}  // namespace resformer::RESFORMER_ISA
