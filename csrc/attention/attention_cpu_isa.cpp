// The attention kernels, compiled once per instruction set (see build_support/native.py).
#include "attention/backward.h"
#include "attention/forward.h"

#if defined(RESFORMER_ISA_AVX512_AMX)
namespace resformer::avx512_bf16 {
extern const Kernels attention_kernels;
}
#endif

namespace resformer::RESFORMER_ISA {
namespace {

#if defined(RESFORMER_ISA_AVX512_AMX)
using Bf16Dot = Bf16Tile;
#elif defined(RESFORMER_ISA_AVX512_BF16)
using Bf16Dot = Bf16Pair;
#else
using Bf16Dot = F32;
#endif

// Full precision keeps scores natural, half precision in log2. An additive bias needs natural ones whatever
// the dtype: log2(e) times the most negative finite number is -inf, and would empty a row masked with it.
template <template <class, class, Precision> class Kernel, class... Arguments>
void run(const Problem& p, const Arguments&... arguments) {
  constexpr Precision full = Precision::full, half = Precision::half;
  const bool natural = p.bias.kind == Bias::Kind::additive;
#if !defined(RESFORMER_ISA_AVX512_AMX)
  if (p.dtype == DType::float32) return Kernel<float, F32, full>(p, arguments...).run();
  if (p.dtype == DType::float16) {
    return natural ? Kernel<f16, F32, full>(p, arguments...).run()
                   : Kernel<f16, F32, half>(p, arguments...).run();
  }
#endif
  return natural ? Kernel<bf16, Bf16Dot, full>(p, arguments...).run()
                 : Kernel<bf16, Bf16Dot, half>(p, arguments...).run();
}

// Tiles multiply bfloat16 alone: the build below AMX's serves what is not.
void forward(const Problem& p, const ForwardOutput& out) {
#if defined(RESFORMER_ISA_AVX512_AMX)
  if (p.dtype != DType::bfloat16) return avx512_bf16::attention_kernels.forward(p, out);
#endif
  run<Forward>(p, out);
}

void backward(const Problem& p, const BackwardInput& in, const BackwardOutput& out) {
#if defined(RESFORMER_ISA_AVX512_AMX)
  if (p.dtype != DType::bfloat16) return avx512_bf16::attention_kernels.backward(p, in, out);
#endif
  run<Backward>(p, in, out);
}

}  // namespace

extern const Kernels attention_kernels = {forward, backward};

}  // namespace resformer::RESFORMER_ISA
