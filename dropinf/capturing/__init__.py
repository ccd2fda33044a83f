"""One backward pass -> rows [B, R]."""

from dropinf.capturing.activations import ActivationsTap
from dropinf.capturing.batch_parts import example_at, moved_to, places_of, size_at
from dropinf.capturing.checking import check_examples
from dropinf.capturing.gradients import GradsTap
from dropinf.capturing.keeping import keeps_examples
from dropinf.capturing.modes import capture
from dropinf.capturing.proof import Proof, ProofError, Prover, alone_in_its_row, verify
from dropinf.capturing.snapshot import Snapshot
from dropinf.capturing.tap import NotClosedError, NotCompiledError

__all__ = [
    "ActivationsTap",
    "GradsTap",
    "NotClosedError",
    "NotCompiledError",
    "Proof",
    "ProofError",
    "Prover",
    "Snapshot",
    "alone_in_its_row",
    "capture",
    "check_examples",
    "example_at",
    "keeps_examples",
    "moved_to",
    "places_of",
    "size_at",
    "verify",
]
