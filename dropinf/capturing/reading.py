"""What a walk over the graph says of each parameter: how it gets its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dropinf.capturing.graph import Site
from dropinf.capturing.owners import Owners
from dropinf.capturing.sources import Derived, Lookup
from dropinf.capturing.walk import Found
from dropinf.compression import ParamPlan

A_PASS = "a pass for each loss"


@dataclass
class Reading:
    """Of one batch of losses.

    Attributes:
        paths: parameter -> how it is captured.
        passes: parameter -> why it takes a pass for each loss.
        shared: functions and parameters whose results several examples share.
        reached: whether any parameter is in the graph.
        closed, lost: whether owners are known of some site, and not known of some.
        pulls: whether what parameters were made into is to be pulled back.
    """

    paths: dict[str, str] = field(default_factory=dict)
    passes: dict[str, str] = field(default_factory=dict)
    shared: set[tuple] = field(default_factory=set)
    reached: bool = False
    closed: bool = False
    lost: bool = False
    pulls: bool = False

    def copy(self) -> Reading:
        """One that can be added to."""
        return replace(
            self, paths=dict(self.paths), passes=dict(self.passes), shared=set(self.shared)
        )

    def add(self, found: Found, slot_of: Mapping[int, ParamPlan], one: bool) -> None:
        """What a walk found; of a batch of one example, no more than that it is met."""
        for node, owners in found.owners.items():
            self.add_site(node.site, None if one else owners)
        for leaf, owners in found.leaves.values():
            slot = slot_of.get(id(leaf))
            if slot is None:
                continue
            self.reached = True
            if one:
                self.paths[slot.name] = A_PASS
            else:
                why = owners if isinstance(owners, str) else "no rule for where it meets data"
                self.passes.setdefault(slot.name, why)
        self.paths.update({n: f"{A_PASS}: {why}" for n, why in self.passes.items()})

    def add_site(self, site: Site, owners: Owners | None) -> None:
        """A site's output has these owners; None where all is one example's."""
        self.reached = True
        self.pulls |= any(_is_pulled(source) for source, _ in site.targets)
        if isinstance(owners, str):
            self.lost = True
            for slot in site.slots:
                self.passes.setdefault(slot.name, owners)
            if owners.endswith("share") or owners.endswith("several examples"):
                self.shared.add((site.name, *(slot.name for slot in site.slots)))
            return
        self.closed = True
        for source, _ in site.targets:
            path = "pulled back" if _is_pulled(source) else "closed form"
            for slot in source.slots:
                if self.paths.get(slot.name) != "pulled back":
                    self.paths[slot.name] = path


def _is_pulled(source: object) -> bool:
    return isinstance(source, Derived) and not isinstance(source, Lookup)
