// The attention kernels, compiled once per instruction set (see build_support/native.py).
#include "attention/backward.h"
#include "attention/forward.h"

namespace resformer::RESFORMER_ISA {
namespace {

void forward(const Problem& p, const ForwardOutput& out) {
  switch (p.dtype) {
    case DType::float32:
      return Forward<float, F32>(p, out).run();
    case DType::float16:
      return Forward<f16, F32>(p, out).run();
#if defined(RESFORMER_ISA_AVX512_BF16)
    case DType::bfloat16:
      return Forward<bf16, Bf16Pair>(p, out).run();
#else
    case DType::bfloat16:
      return Forward<bf16, F32>(p, out).run();
#endif
  }
}

void backward(const Problem& p, const BackwardInput& in, const BackwardOutput& out) {
  switch (p.dtype) {
    case DType::float32:
      return Backward<float, F32>(p, in, out).run();
    case DType::float16:
      return Backward<f16, F32>(p, in, out).run();
#if defined(RESFORMER_ISA_AVX512_BF16)
    case DType::bfloat16:
      return Backward<bf16, Bf16Pair>(p, in, out).run();
#else
    case DType::bfloat16:
      return Backward<bf16, F32>(p, in, out).run();
#endif
  }
}

}  // namespace

extern const Kernels attention_kernels = {forward, backward};

}  // namespace resformer::RESFORMER_ISA
