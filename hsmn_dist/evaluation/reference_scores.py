"""Scores of other models, each with its source and conditions; a bare number is refused.

The rows stand in `reference_scores.yaml`. A row must say source, date, split, shots and metric. What could not be traced is
there too, as `unverified`, because people know those numbers; it may say "not stated" where a verified row may not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hsmn_dist.data.sources import SOURCES
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.registry import near_name

VERIFICATIONS = ("verified", "secondary", "unverified")
NOT_STATED = "not stated"
REQUIRED = ("benchmark", "model", "score", "metric", "split", "shots", "source", "date", "verification")
_OPTIONAL = ("note", "url")
_DATE = re.compile(r"^\d{4}(-\d{2}(-\d{2})?)?$")


@dataclass(frozen=True)
class ReferenceScore:
    """One number that someone else reported.

    Attributes:
        benchmark: dataset name of this project.
        model: as its publisher calls it, with its size where one name has several.
        score: in [0, 1].
        metric: what was measured.
        split: of the benchmark.
        shots: worked examples in the prompt, or "not stated".
        source: who published it and where in the document.
        url: where to read it.
        date: YYYY, YYYY-MM or YYYY-MM-DD of the publication, or "not stated".
        verification: "verified" (read in the source), "secondary" (read where someone else reports it), "unverified".
        note: what one should know before comparing.
    """

    benchmark: str
    model: str
    score: float
    metric: str
    split: str
    shots: int | str
    source: str
    url: str
    date: str
    verification: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """All fields, for `build_scorecard(references=...)`."""
        return asdict(self)


def load_reference_scores(path: Path | None = None) -> list[ReferenceScore]:
    """All rows of a file; None means the one that comes with the package.

    Raises:
        DataError: the file is not of the form, or a row lacks something; the row is named.
    """
    if path is None:
        place = "reference_scores.yaml"
        content = resources.files("hsmn_dist.evaluation").joinpath(place).read_text(encoding="utf-8")
    else:
        place = str(path)
        content = path.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise _refusal(place, f"not YAML ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        raise _refusal(place, "no list `rows`")
    sources = value.get("sources") or {}
    scores = [_score(row, sources, f"{place}, row {number}") for number, row in enumerate(value["rows"], 1)]
    _refuse_repeated(scores, place)
    return scores


def reference_rows(benchmarks: Iterable[str], path: Path | None = None) -> list[dict[str, Any]]:
    """The rows of some benchmarks as JSON values, verified ones first."""
    wanted = set(benchmarks)
    scores = [score for score in load_reference_scores(path) if score.benchmark in wanted]
    scores.sort(key=lambda score: (score.benchmark, VERIFICATIONS.index(score.verification)))
    return [score.to_json() for score in scores]


def _score(row: Any, sources: Mapping[str, Any], where: str) -> ReferenceScore:
    if not isinstance(row, dict):
        raise _refusal(where, f"{type(row).__name__} {row!r}")
    merged = dict(row)
    named = sources.get(str(row.get("source")))
    if isinstance(named, dict):
        merged |= {"source": named.get("title"), "url": named.get("url", ""), "date": named.get("date")}
    missing = [name for name in REQUIRED if merged.get(name) in (None, "")]
    if missing:
        raise _refusal(where, f"no {', '.join(missing)}")
    unknown = sorted(set(merged) - {*REQUIRED, *_OPTIONAL})
    if unknown:
        raise _refusal(where, f"unknown keys {', '.join(unknown)}")
    _check(merged, where)
    texts = {name: str(merged.get(name, "")) for name in ("benchmark", "model", "metric", "split", "source", "url")}
    return ReferenceScore(
        **texts,
        score=float(merged["score"]),
        shots=merged["shots"],
        date=str(merged["date"]),
        verification=str(merged["verification"]),
        note=str(merged.get("note", "")),
    )


def _check(row: dict[str, Any], where: str) -> None:
    if row["benchmark"] not in SOURCES:
        near = near_name(str(row["benchmark"]), SOURCES)
        raise _refusal(where, f"benchmark {row['benchmark']!r}" + (f" (did you mean {near!r}?)" if near else ""))
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0.0 <= score <= 1.0:
        raise _refusal(where, f"score {score!r}, not a number in [0, 1]")
    if row["verification"] not in VERIFICATIONS:
        raise _refusal(where, f"verification {row['verification']!r}, not one of {', '.join(VERIFICATIONS)}")
    verified = row["verification"] == "verified"
    if verified:
        vague = [name for name in ("metric", "split", "shots", "date") if row[name] == NOT_STATED]
        if vague or not str(row.get("url", "")).startswith("https://"):
            raise _refusal(where, f"a verified row whose {', '.join(vague) or 'url'} is not stated")
    shots = row["shots"]
    if shots != NOT_STATED and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 0):
        raise _refusal(where, f"shots {shots!r}, not a count or {NOT_STATED!r}")
    if row["date"] != NOT_STATED and not _DATE.match(str(row["date"])):
        raise _refusal(where, f"date {row['date']!r}, not YYYY, YYYY-MM or YYYY-MM-DD")


def _refuse_repeated(scores: list[ReferenceScore], place: str) -> None:
    seen: dict[tuple[str, str, str, str], int] = {}
    for number, score in enumerate(scores, 1):
        key = (score.benchmark, score.model, score.metric, str(score.shots))
        if key in seen:
            raise _refusal(f"{place}, row {number}", f"the same benchmark, model, metric and shots as row {seen[key]}")
        seen[key] = number


def _refusal(where: str, problem: str) -> DataError:
    return DataError(
        f"{where}: {problem}",
        allowed=f"rows with {', '.join(REQUIRED)}; 'source' may name an entry of `sources` (title, url, date)",
        action="complete the row, or mark it `unverified` with 'not stated' where nothing is known",
    )
