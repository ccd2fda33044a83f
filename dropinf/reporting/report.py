"""write_report: queries, suspicious examples, charts and facts on one page."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dropinf.extras import optional
from dropinf.reporting import charts
from dropinf.reporting.page_contents import PageContents, list_of, plain
from dropinf.results import Attribution, Contents, Ranked
from dropinf.scoring import Stability
from dropinf.solvers import DampingChoice
from dropinf.whole_files import appearing

_HERE = Path(__file__).parent
Tokens = Callable[[Any, Any], Sequence[tuple[str, float]] | None]


def write_report(
    path: str | os.PathLike,
    attribution: Attribution,
    *,
    texts: Contents | None = None,
    query_texts: Contents | None = None,
    images: Contents | None = None,
    query_images: Contents | None = None,
    tokens: Tokens | None = None,
    self_influence: Tensor | None = None,
    scores: Tensor | None = None,
    ids: Sequence[Any] | Tensor | None = None,
    truth: Sequence[bool] | Tensor | None = None,
    layers: Mapping[str, Tensor] | None = None,
    stability: Stability | None = None,
    sweep: DampingChoice | None = None,
    title: str = "What taught the model",
) -> Path:
    """Write one HTML file that shows what was found; an existing one is replaced at once or not.

        found = dropinf.attribute(asked, store, solver)
        own = dropinf.self_influence(store, solver)
        dropinf.write_report("report.html", found, texts=texts, self_influence=own, ids=store.ids)

    It holds what it shows and loads nothing, so that it can be sent and kept. What is not given is
    left out. Texts of the data stay text: nothing of them is run.

    Args:
        path: of the file.
        attribution: of `attribute`: helpful and harmful examples of each query.
        texts, images: of training examples, looked up as in `Attribution.show`. Instead of a text,
            a mapping of names to values shows these. Images are arrays [H, W] or [H, W, 3], of
            bytes or of floats from 0 to 1, tensors whose channels may come first, or bytes of a
            PNG.
        query_texts, query_images: of queries.
        tokens: (query id, example id) -> [(token, its share of the score), ...] shades a text.
        self_influence: [n], for the table of suspicious examples and its distribution.
        scores: [m, n], for their distribution, and the mean score of each training example.
        ids: of the n training examples, `store.ids`; None is 0 .. n - 1.
        truth: [n], which examples are known to be wrong: AUC of self-influence, and of a low mean
            score.
        layers: name of each layer -> its part [m, n] of the scores, see `scores(by="layer")`.
        stability: of `dropinf.stability`.
        sweep: what `choose_damping` returned.
        title: at the top.

    Returns:
        The absolute path.

    Raises:
        TypeError: path or attribution is something else.
        ImportError: jinja2 is missing (extra "report").
        ValueError: there is no text or image for an id, or lengths disagree.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"write_report: path must name a file, got {type(path).__name__}")
    if not isinstance(attribution, Attribution):
        raise TypeError(
            f"write_report: needs what dropinf.attribute returned, got {type(attribution).__name__}"
        )
    jinja2 = optional("jinja2", "report", "write_report")
    shown = PageContents(texts, images, "texts", "images")
    asked = PageContents(query_texts, query_images, "query_texts", "query_images")
    queries = [
        {
            "id": plain(query),
            "content": asked.of(query),
            "top": _examples(attribution.top, q, query, shown, tokens),
            "bottom": _examples(attribution.bottom, q, query, shown, tokens),
        }
        for q, query in enumerate(attribution.query_ids)
    ]
    facts = {"title": "How it was made", "rows": attribution.facts.rows()}
    data: dict[str, Any] = {"queries": queries, "suspicious": None, "charts": [], "tables": [facts]}
    means = None if scores is None else charts.means(scores)
    if self_influence is not None:
        own = list_of(self_influence)
        data["suspicious"] = _suspicious(own, means, ids, truth, shown)
        data["charts"].append(charts.histogram(own, "Self-influence", "self-influence"))
    if scores is not None:
        data["charts"].append(charts.histogram(list_of(scores.flatten()), "Scores", "score"))
    if truth is not None:
        data["tables"].append(charts.finding(truth, self_influence, means))
    if layers is not None:
        data["charts"].append(charts.shares(layers))
    if stability is not None:
        table = stability.describe()
        notes = {"columns": table.columns, "rows": table.rows, "notes": table.notes}
        data["charts"].append(charts.agreements(stability))
        data["tables"].append({"title": "Stability over masks", **notes})
    if sweep is not None:
        data["charts"].append(charts.dampings(sweep))
    data["contents"] = shown.found
    page = _page(jinja2, title, data, attribution)
    path = Path(os.path.abspath(path))
    with appearing(path, replace=True) as new:
        new.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return path


def _page(jinja2: Any, title: str, data: Mapping[str, Any], attribution: Attribution) -> str:
    parts = {name: (_HERE / name).read_text("utf-8") for name in ("style.css", "script.js")}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    template = environment.from_string((_HERE / "page.html.jinja").read_text("utf-8"))
    # In a script element only "<" could end it; the rest is for who reads the source as HTML.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return str(
        template.render(
            title=title,
            style=parts["style.css"],
            script=parts["script.js"],
            style_hash=_hash(parts["style.css"]),
            script_hash=_hash(parts["script.js"]),
            data=text,
            unit=attribution.facts.unit,
            versions=attribution.facts.versions,
        )
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _examples(
    ranked: Ranked, q: int, query: Any, shown: PageContents, tokens: Tokens | None
) -> list[dict[str, Any]]:
    found = []
    for j, id_ in enumerate(ranked.ids[q]):
        if id_ is None:
            continue
        shares = None if tokens is None else tokens(query, id_)
        found.append(
            {
                "id": plain(id_),
                "score": float(ranked.scores[q, j]),
                "error": None if ranked.errors is None else list_of(ranked.errors[q, j : j + 1])[0],
                "content": shown.number(id_),
                "tokens": shares and [[str(token), float(share)] for token, share in shares],
            }
        )
    return found


def _suspicious(
    own: Sequence[float | None],
    means: Sequence[float | None] | None,
    ids: Sequence[Any] | Tensor | None,
    truth: Sequence[bool] | Tensor | None,
    shown: PageContents,
) -> dict[str, Any]:
    n = len(own)
    names = list(range(n)) if ids is None else list_of(ids)
    known = None if truth is None else [bool(t) for t in truth]
    for what, given in (("ids", names), ("truth", known), ("columns of scores", means)):
        if given is not None and len(given) != n:
            raise ValueError(f"write_report: there are {n} self-influences and {len(given)} {what}")
    order = sorted(range(n), key=lambda i: -(own[i] if own[i] is not None else -float("inf")))
    contents = [0] * n
    for i in order:  # those that people look at first are shown whole
        contents[i] = shown.number(names[i])
    return {
        "ids": [plain(name) for name in names],
        "own": own,
        "mean": means,
        "truth": known,
        "contents": contents,
    }
