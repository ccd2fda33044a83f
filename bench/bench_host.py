"""What a capture costs the host, beside plain passes and other packages, on one thread.

    python bench/bench_host.py [--quick] [--json FILE]

Models whose arithmetic is next to nothing, and then whole ones with what `collect` adds. Every
contestant has a copy of the model; they alternate in one process. Rows are checked before they are
timed: dropinf's and Opacus's against gradients of one example in float64, at the plan's
coordinates; those of packages with matrices of their own, for one linear map of the gradients
(`passes.check`). Those take linear layers alone, so norms and embeddings cost them nothing.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from host_cases import (
    A_LAYER,
    FLOOR,
    OF_FLOOR,
    OF_PLAIN,
    OPEN,
    PLAIN,
    Batch,
    Given,
    HostCase,
    cases,
)
from host_contestants import OPACUS, PEERS, R, Timed, contestants
from host_page import bars_table, head, table
from models import MODELS, loss_fn, losses, resnet18
from report import PACKAGES, versions
from torch import Tensor, nn

import dropinf
from dropinf.tools.measuring import LeftOut, alternate, loop_of, spread
from dropinf.tools.microbenchmark import passes
from dropinf.tools.microbenchmark.sweep import commit, machine

WHOLE_R = 1024
COLLECT, PROVEN = "dropinf collect, without its proof", "dropinf collect"
NUM_BATCHES = 2  # of a `collect`


# Whether they compute what they are to.


def in_double(model: nn.Module, batch: Batch, part: slice) -> tuple[nn.Module, Batch]:
    """The model and some examples in float64."""
    given = (t[part].double() if t.is_floating_point() else t[part] for t in batch)
    return copy.deepcopy(model).double(), tuple(given)


def exact_row(model: nn.Module, loss_fn: Callable, batch: Batch, plan: Any, b: int) -> Tensor:
    """[R] of example b."""
    model, one = in_double(model, batch, slice(b, b + 1))
    named = dict(model.named_parameters())
    wanted = [named[slot.name] for slot in plan.slots]
    found = torch.autograd.grad(loss_fn(model, one).sum(), wanted)
    parts = zip(plan.slots, found, strict=True)
    return torch.cat([g.flatten()[s.index] * s.scale for s, g in parts])


def assert_near(found: Tensor, truth: Tensor, name: str) -> None:
    assert found.shape == truth.shape, (name, found.shape, truth.shape)
    assert (found.double() - truth).norm() <= 1e-4 * truth.norm(), name


def check(
    name: str, timed: Timed, own: Given, given: Given, loss_fn: Callable, plan: dropinf.Plan
) -> None:
    """A contestant, which has `own`, a copy of what is given."""
    B = len(given.batch[0])
    with timed.inside:
        found = timed.call()
    if name == PLAIN:
        double, batch = in_double(given.model, given.batch, slice(None))
        loss_fn(double, batch).sum().backward()
        for slot in plan.slots:
            truth = double.get_parameter(slot.name).grad
            assert_near(own.model.get_parameter(slot.name).grad, truth, f"{name}: {slot.name}")
        return
    if name in PEERS:
        kept, layers = found.shape[1] // R, given.linear()
        if kept != len(layers):
            raise LeftOut(f"keeps rows of {kept} of {len(layers)} linear layers")
        squares = found.unflatten(1, (kept, R))
        assert len(found) == B and squares.isfinite().all() and squares.any(2).any(0).all(), name
        check_peer(name)
        return
    for b in {0, B // 2, B - 1}:
        if name == FLOOR:
            one = Given(*in_double(given.model, given.batch, slice(b, b + 1)))
            leaf = one.leaf.detach().requires_grad_()
            loss = loss_fn(one.model, (leaf, one.batch[1])).sum()
            truth = torch.autograd.grad(loss, leaf)[0][0]
        else:
            truth = exact_row(given.model, loss_fn, given.batch, plan, b)
        assert_near(found[b], truth, f"{name}: {b}")


@functools.cache
def check_peer(name: str) -> None:
    """That its rows are one linear map of the gradients, once on inputs of their own."""
    with contextlib.redirect_stderr(io.StringIO()):
        passes.check(name, torch.device("cpu"))


# Timing.


def contest(
    title: str,
    makers: dict[str, Callable[[], tuple[Timed, Callable[[], None]]]],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Seconds in each round, and who is left out; of names -> what makes it, and its check.

    An error of a peer is its reason; ours are raised.
    """
    loops, left_out = {}, {}
    for name, make in makers.items():
        print(f"{title}: {name}", file=sys.stderr, flush=True)
        try:
            timed, checked = make()
            checked()
        except LeftOut as reason:
            left_out[name] = str(reason)
            continue
        except Exception as error:
            if name not in PEERS and name != OPACUS:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        with timed.inside:
            loop = loop_of(lambda _, call=timed.call: call(), seconds)
        loops[name] = settled(timed, loop)
    return {"seconds": alternate(loops, rounds), "left_out": left_out}


def settled(timed: Timed, loop: Callable[[], float]) -> Callable[[], float]:
    """The loop after a call, since the contestant before left the heap and the caches its way."""

    def run() -> float:
        with timed.inside:
            timed.call()
            return loop()

    return run


def host(title: str, case: HostCase, rounds: int, seconds: float) -> dict[str, Any]:
    """A case with all contestants."""
    torch.manual_seed(0)
    try:
        given = case.make()
    except LeftOut as reason:
        return {"title": title, "left_out": {"all": str(reason)}, "contestants": {}, "bars": []}
    given.model.eval()
    plan = dropinf.Plan.make(given.model, dropinf.Dropout(r=R))

    def maker(contestant: Callable[..., Timed], name: str) -> Callable[[], Any]:
        def make() -> tuple[Timed, Callable[[], None]]:
            own = given.copied()
            timed = contestant(own, case.loss_fn, plan)
            return timed, lambda: check(name, timed, own, given, case.loss_fn, plan)

        return make

    found = contest(title, {n: maker(c, n) for n, c in contestants().items()}, rounds, seconds)
    return measured(title, found, len(plan.blocks), case.bars)


def whole(title: str, make: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """A model of usual size: rows, and `collect` of some batches with what it does beside them."""
    torch.manual_seed(0)
    model, batch = make()
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=WHOLE_R))
    label = batch[1]
    frozen = copy.deepcopy(model).requires_grad_(False)
    tap = dropinf.capture(model, plan)

    def floor() -> Tensor:
        leaf = frozen.embed(batch[0]).detach().requires_grad_()
        return torch.autograd.grad(losses(frozen.body(leaf), label).sum(), leaf)[0]

    def collected(proven: bool) -> Callable[[], Tensor]:
        options = {"progress": False, "check": proven}
        batches = [batch] * NUM_BATCHES
        return lambda: dropinf.collect(model, batches, loss_fn, plan, **options).rows[: len(label)]

    def checked(name: str, timed: Timed) -> None:
        b = len(label) - 1
        with timed.inside:
            found = timed.call()[b]
        if name == FLOOR:
            double, one = in_double(model, batch, slice(b, b + 1))
            leaf = double.embed(one[0]).detach().requires_grad_()
            truth = torch.autograd.grad(losses(double.body(leaf), one[1]).sum(), leaf)[0][0]
        else:
            truth = exact_row(model, loss_fn, batch, plan, b)
        assert_near(found, truth, name)

    all_timed = {
        FLOOR: Timed(floor),
        OPEN: Timed(lambda: tap.rows(loss_fn(model, batch)), tap),
        COLLECT: Timed(collected(False)),
        PROVEN: Timed(collected(True)),
    }
    makers = {n: lambda n=n, t=t: (t, lambda: checked(n, t)) for n, t in all_timed.items()}
    found = contest(title, makers, rounds, 0)
    for name in (COLLECT, PROVEN):
        found["seconds"][name] = [s / NUM_BATCHES for s in found["seconds"][name]]
    bars = dict.fromkeys((OPEN, COLLECT), (OF_FLOOR, 1.05))
    return measured(title, found, len(plan.blocks), bars)


def measured(
    title: str, found: dict[str, Any], num_layers: int, bars: dict[str, tuple[str, float]] | None
) -> dict[str, Any]:
    """[median, smallest, largest] over the rounds, of times and of ratios within a round."""
    seconds, by_name = found["seconds"], {}
    for name, times in seconds.items():
        by_name[name] = {"ms": spread([1e3 * s for s in times])}
        for measure, other in ((OF_FLOOR, FLOOR), (OF_PLAIN, PLAIN)):
            if other in seconds:
                ratios = [a / b for a, b in zip(times, seconds[other], strict=True)]
                by_name[name][measure] = spread(ratios)
        over = [1e6 * (a - b) / num_layers for a, b in zip(times, seconds[FLOOR], strict=True)]
        by_name[name][A_LAYER] = spread(over)
    held = [
        {"contestant": n, "measure": m, "at_most": most, "found": by_name[n][m][0]}
        for n, (m, most) in (bars or {}).items()
    ]
    return {
        "title": title,
        "layers": num_layers,
        "contestants": by_name,
        "left_out": found["left_out"],
        "bars": held,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models and two rounds: a test")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    quick = options.quick
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of packages that use what is deprecated
    logging.disable(logging.WARNING)  # dattri says what it does
    rounds, whole_rounds = (2, 1) if quick else (15, 5)
    models = {"ResNet-18, 32 x 32, B=2": lambda: resnet18(B=2, side=32)} if quick else MODELS
    seconds = 0 if quick else 0.05
    runs = [lambda t=t, c=c: host(t, c, rounds, seconds) for t, c in cases(quick).items()]
    runs += [lambda t=t, m=m: whole(t, m, whole_rounds) for t, m in models.items()]
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(torch.device("cpu")),
        "commit": commit(),
        "versions": ", ".join(versions("dropinf", *PACKAGES, "opacus", "peft")),
        "rounds": rounds,
        "whole_rounds": whole_rounds,
        "r": [R, WHOLE_R],
        "collected": NUM_BATCHES,
        "cases": [],
    }
    print(*head(results), sep="\n", flush=True)
    for run in runs:  # what was measured is there, whatever ends the rest
        results["cases"].append(run())
        print(*table(results["cases"][-1]), sep="\n", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(*bars_table(results["cases"]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
