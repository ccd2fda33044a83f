// Which instructions the CPU kernels use: chosen once at run time, and by tests.

#include "cpu/capability.h"

#include <atomic>

namespace dropinf {
namespace {

bool has_avx2() {
#if DROPINF_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

std::atomic<bool> allow_avx2{has_avx2()};

}  // namespace

bool use_avx2() { return allow_avx2; }

std::string cpu_capability() { return use_avx2() ? "avx2" : "portable"; }

bool set_cpu_capability(const std::string& name) {
  if (name != "portable" && !(name == "avx2" && has_avx2())) return false;
  allow_avx2 = name == "avx2";
  return true;
}

}  // namespace dropinf
