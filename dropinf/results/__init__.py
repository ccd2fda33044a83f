"""What people look at: the best and worst examples of each query, how that was found; tables."""

from dropinf.results.attribution import Attribution, Ranked, attribute
from dropinf.results.contents import Contents, Lookup
from dropinf.results.facts import Facts, facts_of
from dropinf.results.score_table import ScoreTable

__all__ = [
    "Attribution",
    "Contents",
    "Facts",
    "Lookup",
    "Ranked",
    "ScoreTable",
    "attribute",
    "facts_of",
]
