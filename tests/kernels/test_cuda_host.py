"""The host execution of CUDA kernels: as on a device, and refusing what kernels must not use."""

import os
import subprocess
from pathlib import Path

import pytest
from cuda_host import build

KERNELS = """
#include <cassert>
#include <cstdio>
#include <vector>

#include "cuda/common.cuh"

using namespace dropinf::cuda;

__global__ void reverse(const float* from, float* to, int n) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = from[blockIdx.x * n + threadIdx.x];
  __syncthreads();
  to[blockIdx.x * n + threadIdx.x] = shared[n - 1 - threadIdx.x];
}

__global__ void sum(const float* from, float* to) {
  float total = from[threadIdx.x];
  for (int n = 16; n > 0; n /= 2) total += __shfl_xor_sync(kAllLanes, total, n);
  const float last = __shfl_sync(kAllLanes, from[threadIdx.x], 31);
  const float below = __shfl_up_sync(kAllLanes, from[threadIdx.x], 1);
  const unsigned odd = __ballot_sync(kAllLanes, threadIdx.x % 2);
  to[threadIdx.x] = total + last + below + (odd == 0xaaaaaaaau);
}

__global__ void copy(const float* from, float* to, bool waits) {
  float* shared = shared_memory<float>();
  if (threadIdx.x < 8) copy_16_async(shared + 4 * threadIdx.x, from + 4 * threadIdx.x);
  end_copy_group();
  if (waits) wait_for_copies<0>();
  __syncthreads();
  to[threadIdx.x] = shared[threadIdx.x];
}

int main() {
  alignas(16) float from[192], to[192];
  for (int k = 0; k < 192; ++k) from[k] = k;
  assert(launch(reverse, grid_of(2), 96, 96 * 4, nullptr, (const float*)from, to, 96) == 0);
  for (int k = 0; k < 192; ++k) assert(to[k] == k / 96 * 96 + 95 - k % 96);
  assert(launch(sum, grid_of(1), 64, 0, nullptr, (const float*)from, to) == 0);
  assert(to[1] == 496 + 31 + 0 + 1 && to[0] == 496 + 31 + 0 + 1);
  assert(to[33] == 1520 + 63 + 32 + 1);
  assert(launch(copy, grid_of(1), 32, 128, nullptr, (const float*)from, to, true) == 0);
  for (int k = 0; k < 32; ++k) assert(to[k] == k);
  assert(launch(copy, grid_of(1), 32, 128, nullptr, (const float*)from, to, false) == 0);
  for (int k = 0; k < 32; ++k) assert(to[k] != to[k]);  // what was not waited for is not there
  // What a device refuses to launch.
  assert(launch(copy, grid_of(1), 32, 200 << 10, nullptr, (const float*)from, to, true) != 0);
  assert(launch(copy, grid_of(1), 1056, 128, nullptr, (const float*)from, to, true) != 0);
  const dim3 too_many = grid_of(int64_t{1} << 31);
  assert(launch(copy, too_many, 32, 128, nullptr, (const float*)from, to, true) != 0);
  // More than 48 KB only where the kernel is allowed to, which a launch asks for once and in full.
  const auto run = [](int kb) {
    const auto kernel = reinterpret_cast<const void*>(reverse);
    return host_execution::run(kernel, grid_of(1), 96, kb << 10, [] {});
  };
  const auto launched = [&](int kb) {
    return launch(reverse, grid_of(1), 96, kb << 10, nullptr, (const float*)from, to, 96);
  };
  assert(launched(48) == 0 && run(48) == 0 && run(49) != 0);
  assert(launched(60) == 0 && run(163) == 0 && run(164) != 0);
  host_execution::max_shared_bytes = 99 << 10;  // another device
  assert(run(60) != 0 && launched(60) == 0 && run(99) == 0 && launched(100) != 0);
  host_execution::allowed_bytes.clear();
  assert(launched(60) != 0);
  std::puts("as a device");
}
"""


def compiled(tmp_path, source):
    file = tmp_path / "kernels.cpp"
    file.write_text(source)
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-pthread", f"-I{build.HERE}", f"-I{build.SOURCES}"]
    command = [compiler, *flags, str(file), "-o", str(tmp_path / "kernels")]
    return subprocess.run(command, capture_output=True, text=True)


def test_as_a_device(tmp_path):
    done = compiled(tmp_path, KERNELS)
    assert done.returncode == 0, done.stderr
    run = subprocess.run([tmp_path / "kernels"], capture_output=True, text=True)
    assert run.stdout == "as a device\n", run.stderr


@pytest.mark.parametrize(
    "line, name",
    [
        ("float s = 0.0f; atomicAdd(&s, 1.0f);", "atomicAdd"),
        ("__shared__ float shared[32]; shared[0] = 1.0f;", "__shared__"),
    ],
)
def test_refused(tmp_path, line, name):
    kernel = f'#include "cuda/common.cuh"\n__global__ void kernel() {{ {line} }}\nint main() {{}}\n'
    done = compiled(tmp_path, kernel)
    assert done.returncode != 0 and name in done.stderr


def test_an_access_that_is_not_aligned_ends_it(tmp_path):
    kernel = KERNELS.replace("from + 4 * threadIdx.x", "from + 4 * threadIdx.x + 1")
    assert compiled(tmp_path, kernel).returncode == 0
    run = subprocess.run([tmp_path / "kernels"], capture_output=True, text=True)
    assert run.returncode != 0 and "is not aligned" in run.stderr


def test_objects_depend_on_all_that_they_include():
    """As the compiler lists it; and on nothing else, or a fault planted in one would build all."""
    sources = [*sorted(build.SOURCES.glob("cuda/*.cu")), build.SOURCES / "bank_order.cpp"]
    for source in sources:
        command = [build.COMPILER, "-std=c++20", f"-I{build.HERE}", f"-I{build.SOURCES}", "-MM"]
        listed = subprocess.run(
            [*command, "-x", "c++", str(source)], capture_output=True, text=True, check=True
        ).stdout
        files = listed.replace("\\\n", " ").split()[1:]
        found = build._included(source, build.SOURCES)
        assert sorted(f.resolve() for f in found) == sorted({Path(f).resolve() for f in files})
