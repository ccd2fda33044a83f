"""What embedding dropinf in other tools saves: each tool before and after, on the same inputs."""

import sys

import embed_captum
import embed_compress
import embed_dattri
import embed_trainers
import embed_trak
import pytest
from memory import peak_in_own_process, peak_of, skip_without_proc

CASES = {
    **embed_compress.CASES,
    **embed_trak.CASES,
    **embed_dattri.CASES,
    **embed_captum.CASES,
    **embed_trainers.CASES,
}
ROUNDS = 3  # of contestants that take seconds


@pytest.mark.parametrize("title", CASES, ids=list(CASES))
def bench_embed(timed, benchmark, title):
    case = CASES[title]
    inputs = case.make()
    calls, left_out = case.calls(inputs)
    if case.ours not in calls:
        pytest.skip(left_out[case.ours])
    case.check(inputs, calls)
    timed(calls, case.ours, case.to_reach, rounds=ROUNDS)
    benchmark.extra_info["left_out"] = left_out


@pytest.mark.parametrize("title", CASES, ids=list(CASES))
def bench_embed_memory(benchmark, title):
    """Peak resident memory of one call above what the process held before, MB (10⁶ bytes)."""
    skip_without_proc()
    case = CASES[title]
    calls, left_out = case.calls(case.make(), held=True)
    if case.ours not in calls:
        pytest.skip(left_out[case.ours])
    peaks = {name: peak_in_own_process(__file__, title, name) for name in calls}
    benchmark.extra_info.update(
        peaks=peaks, rows=case.rows, ours=case.ours, left_out=left_out, at_most=case.at_most or {}
    )
    benchmark.pedantic(lambda: None)


def main(title: str, name: str) -> None:
    """Print the peak of one contestant, in this process of its own."""
    case = CASES[title]
    print(peak_of((case.held or case.contestants)[name](case.make())))


if __name__ == "__main__":
    main(*sys.argv[1:])
