// Which instructions the CPU kernels use. A function of theirs is in `namespace portable` and, for
// processors with AVX2, FMA and F16C, in `namespace avx2`: written once and compiled for each (see
// each_capability.h), or twice where it names instructions. CAPABLE(f) is the one to call.

#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define DROPINF_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define CAPABLE(...) (use_avx2() ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define CAPABLE(...) (portable::__VA_ARGS__)
#endif

namespace dropinf {

// "avx2" where the processor has AVX2, FMA and F16C, else "portable".
std::string cpu_capability();
// For tests. False if this processor or build does not have it.
bool set_cpu_capability(const std::string& name);

// True where cpu_capability() is "avx2".
bool use_avx2();

}  // namespace dropinf
