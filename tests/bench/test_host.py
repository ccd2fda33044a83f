"""bench_host in its tiny size: what it measures, checks and prints."""

import json
import re

import bench_host
import host_contestants
import pytest
import report
import torch
from bench_host import PROVEN
from host_cases import A_LAYER, FLOOR, OF_FLOOR, OPEN, OPENED, PLAIN, cases
from host_contestants import OPACUS, Timed, contestants

import dropinf

MLP, CNN = "MLP of width 64, 5 layers, B=16", "CNN, 3 convolutions and a head, B=16"


@pytest.fixture(autouse=True)
def threads():
    """As many as before; the script takes one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(before)


def refusing(work):
    raise ValueError("not this model\nand a second line")


def ones(work):
    return lambda: torch.ones(len(work.batch[0]), bench_host.R * len(work.layers))


def test_quick(tmp_path, monkeypatch, capsys):
    """Every contestant is timed or has its reason, and ratios are of the times."""
    for module in (bench_host, host_contestants):
        monkeypatch.setattr(module, "PEERS", {"Bergson": refusing, "short": ones})
    monkeypatch.setattr(bench_host, "check_peer", lambda name: None)
    few = {title: cases(quick=True)[title] for title in (MLP, CNN)}
    monkeypatch.setattr(bench_host, "cases", lambda quick: few)
    file = tmp_path / "host.json"
    bench_host.main(["--quick", "--json", str(file)])
    results, printed = json.loads(file.read_text()), capsys.readouterr().out
    mlp, cnn, whole = results["cases"]
    for case in (mlp, cnn):
        found, left_out = case["contestants"], case["left_out"]
        assert list(found)[:4] == [PLAIN, FLOOR, OPEN, OPENED]
        assert OPACUS in found or "opacus is not installed" in left_out[OPACUS]
        assert left_out["Bergson"] == "ValueError: not this model"
        assert found["short"]["ms"][0] < found[OPEN]["ms"][0]
        assert found[FLOOR][OF_FLOOR] == [1, 1, 1] and found[FLOOR][A_LAYER] == [0, 0, 0]
        low, high = (found[OPEN]["ms"][i] / found[FLOOR]["ms"][3 - i] for i in (1, 2))
        assert low <= found[OPEN][OF_FLOOR][0] <= high
        for name in found:
            assert f"\n| {name} | {report.spread(found[name]['ms'])} | " in printed
        for name, why in left_out.items():
            assert f"\n| {name} | not run: {why} | " in printed
    over = mlp["contestants"][OPEN][A_LAYER][0]
    assert mlp["bars"] == [{"contestant": OPEN, "measure": A_LAYER, "at_most": 40, "found": over}]
    reached = "yes" if over <= 40 else "**no**"
    assert f"| {OPEN} | {A_LAYER} | 40 | {over:.3g} | {reached} |" in printed
    assert PROVEN in whole["contestants"] and len(whole["bars"]) == 2


@pytest.mark.parametrize("title", [MLP, CNN])
@pytest.mark.parametrize("name", [PLAIN, FLOOR, OPEN])
def test_wrong_results_are_not_timed(title, name):
    """One example's number that is off is seen."""
    case = cases(quick=True)[title]
    given = case.make()
    plan = dropinf.Plan.make(given.model, dropinf.Dropout(r=bench_host.R))
    own = given.copied()
    timed = contestants()[name](own, case.loss_fn, plan)
    bench_host.check(name, timed, own, given, case.loss_fn, plan)

    def call():
        found = timed.call()
        wrong = own.model[0].weight.grad if name == PLAIN else found[-1]
        wrong.view(-1)[0] += 1e-3 * wrong.norm()
        return found

    with pytest.raises(AssertionError, match=re.escape(name)):
        bench_host.check(name, Timed(call, timed.inside), own, given, case.loss_fn, plan)
