"""One backward pass -> rows [B, R]."""

from dropinf.capturing.activations import ActivationsTap
from dropinf.capturing.checking import check_examples, one_example
from dropinf.capturing.gradients import GradsTap
from dropinf.capturing.keeping import keeps_examples
from dropinf.capturing.modes import capture
from dropinf.capturing.proof import Proof, ProofError, Prover, Snapshot, alone_in_its_row, verify
from dropinf.capturing.tap import NotClosedError

__all__ = [
    "ActivationsTap",
    "GradsTap",
    "NotClosedError",
    "Proof",
    "ProofError",
    "Prover",
    "Snapshot",
    "alone_in_its_row",
    "capture",
    "check_examples",
    "keeps_examples",
    "one_example",
    "verify",
]
