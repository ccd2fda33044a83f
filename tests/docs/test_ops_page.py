"""The page of the ops has every op, with the backends that it is written for."""

import re

from places import ROOT

from dropinf import ops
from dropinf.ops.dispatch import KERNELS

PAGE = (ROOT / "docs" / "ops.md").read_text()


def test_its_tables_are_the_code():
    tables = PAGE.partition("## Backends")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", tables, re.M)
    told = {op: set(re.findall(r"`(\w+)`", backends)) for op, backends in rows}
    assert told == {op: {*KERNELS[op]} - {"reference"} for op in KERNELS}


def test_every_op_is_run_there():
    for op in KERNELS:
        assert f"ops.{op}(" in PAGE and hasattr(ops, op)
