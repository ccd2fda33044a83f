// The functions of KERNELS (a header like this one) once for each capability, in `namespace avx2`
// and `namespace portable`, with TARGET as their attribute. Included inside namespace dropinf.
// No include guard.

namespace portable {
namespace {
#define TARGET
#include KERNELS
#undef TARGET
}  // namespace
}  // namespace portable

#if DROPINF_AVX2
namespace avx2 {
namespace {
#define TARGET AVX2
#include KERNELS
#undef TARGET
}  // namespace
}  // namespace avx2
#endif
