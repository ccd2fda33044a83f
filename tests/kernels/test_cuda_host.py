"""The host execution of CUDA kernels: as on a device, and refusing what kernels must not use."""

import os
import subprocess
from pathlib import Path

import pytest
from cuda_host import build

KERNELS = """
#include <cassert>
#include <cstdio>
#include <cstring>
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

// Whether any is larger; and a barrier.
__global__ void vote(const float* from, float* to, float than) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = from[threadIdx.x];
  const bool any = __syncthreads_or(from[threadIdx.x] > than);
  to[threadIdx.x] = any ? shared[95 - threadIdx.x] : -1;
}

__global__ void copy(const float* from, float* to, bool waits) {
  float* shared = shared_memory<float>();
  if (threadIdx.x < 8) copy_16_async(shared + 4 * threadIdx.x, from + 4 * threadIdx.x);
  end_copy_group();
  if (waits) wait_for_copies<0>();
  __syncthreads();
  to[threadIdx.x] = shared[threadIdx.x];
}

// Each thread reads what another wrote: a later one, and one that is before it.
__global__ void neighbours(const float* from, float* to, int n, bool waits) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = from[threadIdx.x];
  if (waits) __syncthreads();
  const int at = 2 * (blockIdx.x * n + threadIdx.x);
  to[at] = shared[(threadIdx.x + 1) % n];
  to[at + 1] = shared[(threadIdx.x + n - 1) % n];
}

__global__ void half_waits() {
  if (threadIdx.x < 32) __syncthreads();
}

// How many numbers `neighbours` read right, of those above the first and below the last thread.
void count(bool waits, int* later, int* before) {
  constexpr int kBlocks = 16, kThreads = 64;
  static float from[kThreads], to[kBlocks * kThreads * 2];
  for (int k = 0; k < kThreads; ++k) from[k] = k;
  const int bytes = 4 * kThreads;
  assert(launch(neighbours, grid_of(kBlocks), kThreads, bytes, nullptr, (const float*)from, to,
                kThreads, waits) == 0);
  *later = *before = 0;
  for (int k = 0; k < kBlocks * kThreads; ++k) {
    const int thread = k % kThreads;
    *later += thread < kThreads - 1 && to[2 * k] == thread + 1;
    *before += thread > 0 && to[2 * k + 1] == thread - 1;
  }
}

int main(int argc, char** argv) {
  alignas(16) float from[192], to[192];
  for (int k = 0; k < 192; ++k) from[k] = k;
  if (argc > 1 && std::strcmp(argv[1], "not aligned") == 0) {
    return launch(copy, grid_of(1), 32, 128, nullptr, (const float*)from + 1, to, true);
  }
  if (argc > 1) return launch(half_waits, grid_of(1), 64, 0, nullptr);
  int later, before;
  count(true, &later, &before);
  assert(later == 16 * 63 && before == 16 * 63);
  // Without the barrier either is wrong in some of the blocks.
  count(false, &later, &before);
  assert(later < 16 * 63 && before < 16 * 63);
  assert(launch(reverse, grid_of(2), 96, 96 * 4, nullptr, (const float*)from, to, 96) == 0);
  for (int k = 0; k < 192; ++k) assert(to[k] == k / 96 * 96 + 95 - k % 96);
  assert(launch(sum, grid_of(1), 64, 0, nullptr, (const float*)from, to) == 0);
  assert(to[1] == 496 + 31 + 0 + 1 && to[0] == 496 + 31 + 0 + 1);
  assert(to[33] == 1520 + 63 + 32 + 1);
  for (const float than : {94.0f, 95.0f}) {  // the last thread's alone; none
    assert(launch(vote, grid_of(1), 96, 96 * 4, nullptr, (const float*)from, to, than) == 0);
    for (int k = 0; k < 96; ++k) assert(to[k] == (than < 95 ? 95 - k : -1));
  }
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


def compiler(source, *options):
    """What it is asked to do with a file."""
    found = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-pthread", f"-I{build.HERE}", f"-I{build.SOURCES}"]
    command = [found, *flags, str(source), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """program("not aligned"): what that run of KERNELS prints, and how it ends."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "kernels.cpp").write_text(KERNELS)
    done = compiler(folder / "kernels.cpp", "-o", folder / "kernels")
    assert done.returncode == 0, done.stderr
    return lambda *arguments: subprocess.run(
        [folder / "kernels", *arguments], capture_output=True, text=True
    )


def test_as_a_device(program):
    run = program()
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
    (tmp_path / "kernel.cpp").write_text(kernel)
    done = compiler(tmp_path / "kernel.cpp", "-fsyntax-only")
    assert done.returncode != 0 and name in done.stderr


def test_an_access_that_is_not_aligned_ends_it(program):
    run = program("not aligned")
    assert run.returncode != 0 and "is not aligned" in run.stderr


def test_a_barrier_that_some_never_reach_ends_it(program):
    run = program("half waits")
    assert run.returncode != 0 and "a barrier that others never reach" in run.stderr


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
