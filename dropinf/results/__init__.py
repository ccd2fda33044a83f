"""What people look at: the best and worst examples of each query, and how that was found."""

from dropinf.results.attribution import Attribution, Ranked, attribute
from dropinf.results.contents import Contents, Lookup
from dropinf.results.facts import Facts, facts_of

__all__ = [
    "Attribution",
    "Contents",
    "Facts",
    "Lookup",
    "Ranked",
    "attribute",
    "facts_of",
]
