"""The scorecard as one HTML page that needs no other file, no script and no network.

Heat maps are table cells with a background, curves are inline SVG, so the page prints, zooms and can be sent by mail.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from hsmn_dist.evaluation import scorecard_text as words
from hsmn_dist.evaluation.scorecard import Scorecard

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1.2rem; color: #1c2530; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; margin: 0.4rem 0; } th { text-align: left; font-weight: 600; background: #f2f5f8; }
th, td { border: 1px solid #d5dce3; padding: 0.3rem 0.6rem; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } td.own { outline: 2px solid #1c2530; outline-offset: -2px; }
.missing { color: #75808c; font-style: italic; } .note { color: #55606c; font-size: 0.85rem; max-width: 60rem; }
.small { font-size: 0.82rem; color: #44505c; } .side { display: flex; flex-wrap: wrap; gap: 2rem; }
.wide { overflow-x: auto; } pre { background: #f2f5f8; padding: 0.8rem; overflow-x: auto; } svg text { font: 11px system-ui; }
"""
_COLORS = ("#1f6fb4", "#d1622b", "#2f8f4e", "#8e4fb0", "#b08a1a", "#c0397a", "#3aa0a8", "#6b6b6b")


def scorecard_html(card: Scorecard) -> str:
    """The whole page."""
    title = f"Scorecard of {card.run.get('run_id', 'a run')}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table(("", ""), words.run_rows(card)),
        "<h2>Tasks after the last stage</h2>" + _final_table(card),
        "<h2>Every task after every stage</h2>" + _matrices(card),
        '<p class="note">A frame marks the stage that trained the task. A score is in percent; a loss is in nats per target '
        "token, and lower is better.</p>",
        "<h2>Forgetting</h2>" + _curves(card),
        "<h2>Transfer</h2>" + _table(("", "by score (points)", "by loss (nats)"), words.transfer_rows(card)),
        '<p class="note">Differences: higher is better; forgetting: lower is better. Brackets are 95 percent intervals '
        "over test examples.</p>",
        "<h2>Training</h2>" + _stage_table(card),
        _references(card),
        "<h2>Test examples found in training data</h2>"
        + _table(("task", "found"), [(task, words.contamination_text(e)) for task, e in card.contamination.items()]),
        "<h2>Cost</h2>" + _table(("", ""), words.cost_rows(card)),
        _packages(card),
        _reproduce(card),
    ]
    body = "\n".join(part for part in sections if part)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _final_table(card: Scorecard) -> str:
    rows = []
    for task in card.tasks:
        result = card.final(task)
        if result is None:
            rows.append(f'<tr><td>{escape(task)}</td><td colspan="5" class="missing">{words.NOT_MEASURED}</td></tr>')
            continue
        extra = ", ".join(f"{name} {100 * value:.1f}" for name, value in result["extra"].items())
        cells = [
            f"<td>{escape(task)}</td>",
            f"<td>{escape(result['metric'])}</td>",
            _number(words.with_interval(result)),
            f'<td class="small">{escape(extra)}</td>',
            _number(words.nats(result["nll_per_token"])),
            f'<td class="small">{escape(words.conditions_text(result))}</td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = _head(("task", "metric", "score (percent)", "also", "loss (nats)", "conditions"))
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _number(text: str) -> str:
    kind = "number missing" if text.startswith(words.NOT_MEASURED) else "number"
    return f'<td class="{kind}">{escape(text)}</td>'


def _matrices(card: Scorecard) -> str:
    scores = _heat_map(card, card.score_matrix, card.baseline_scores, is_loss=False)
    losses = _heat_map(card, card.loss_matrix, card.baseline_losses, is_loss=True)
    return f'<div class="side"><div><b>score</b>{scores}</div><div><b>loss</b>{losses}</div></div>'


def _heat_map(
    card: Scorecard, matrix: Sequence[Sequence[float | None]], baseline: Sequence[float | None], is_loss: bool
) -> str:
    known = [value for row in [*matrix, baseline] for value in row if value is not None]
    low, high = (min(known), max(known)) if is_loss and known else (0.0, 1.0)
    rows = [("before training", "", baseline)] if any(value is not None for value in baseline) else []
    rows += [(f"after {stage.name}", stage.name, row) for stage, row in zip(card.stages, matrix, strict=True)]
    lines = []
    for label, stage, row in rows:
        cells = [
            _heat_cell(
                value, (value - low) / (high - low) if value is not None and high > low else 0.0, is_loss, task == stage
            )
            for task, value in zip(card.tasks, row, strict=True)
        ]
        lines.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{_head(("", *card.tasks))}{"".join(lines)}</table></div>'


def _heat_cell(value: float | None, share: float, is_loss: bool, is_own: bool) -> str:
    own = " own" if is_own else ""
    if value is None:
        return f'<td class="number missing{own}">{words.NOT_MEASURED}</td>'
    good = 1.0 - share if is_loss else share
    # White to blue: dark enough to see, light enough for black figures.
    red, green, blue = (round(255 + (end - 255) * 0.85 * good) for end in (86, 160, 211))
    text = words.nats(value) if is_loss else words.percent(value)
    return f'<td class="number{own}" style="background:rgb({red},{green},{blue})">{text}</td>'


def _curves(card: Scorecard) -> str:
    scores = _svg(card, card.score_matrix, card.baseline_scores, is_loss=False)
    losses = _svg(card, card.loss_matrix, card.baseline_losses, is_loss=True)
    return f'<div class="side"><div><b>score (percent)</b><br>{scores}</div><div><b>loss (nats)</b><br>{losses}</div></div>'


def _svg(
    card: Scorecard, matrix: Sequence[Sequence[float | None]], baseline: Sequence[float | None], is_loss: bool
) -> str:
    """Lines of the tasks over the stages; a point that was not measured leaves a gap."""
    factor = 1.0 if is_loss else 100.0
    known = [factor * value for row in [*matrix, baseline] for value in row if value is not None]
    if not known:
        return f'<span class="missing">{words.NOT_MEASURED}</span>'
    low, high = min(known), max(known)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    left, top, width, height = 48, 10, 380, 200
    steps = max(1, len(matrix))

    def place(x: int, value: float) -> tuple[float, float]:
        return left + width * x / steps, top + height * (high - factor * value) / (high - low)

    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#d5dce3"/>']
    for value in (low, (low + high) / 2, high):
        y = place(0, value / factor)[1]
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.{2 if is_loss else 1}f}</text>')
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eef1f4"/>')
    for index, name in enumerate(["before", *[stage.name for stage in card.stages]]):
        x = left + width * index / steps
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{escape(name)}</text>')
    for column, task in enumerate(card.tasks):
        values = [baseline[column], *[row[column] for row in matrix]]
        parts.append(
            _svg_line(card, task, [place(x, v) if v is not None else None for x, v in enumerate(values)], column)
        )
    legend = [
        f'<tspan fill="{_COLORS[column % len(_COLORS)]}">&#9632; {escape(task)} </tspan>'
        for column, task in enumerate(card.tasks)
    ]
    parts.append(f'<text x="{left}" y="{top + height + 36}">{"  ".join(legend)}</text>')
    return f'<svg width="{left + width + 60}" height="{top + height + 46}" role="img">{"".join(parts)}</svg>'


def _svg_line(card: Scorecard, task: str, points: Sequence[tuple[float, float] | None], column: int) -> str:
    color = _COLORS[column % len(_COLORS)]
    parts = []
    for before, after in pairwise(points):
        if before and after:
            (x1, y1), (x2, y2) = before, after
            line = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
            parts.append(f'<line {line} stroke="{color}" stroke-width="2"/>')
    for index, point in enumerate(points):
        if point:
            is_own = index > 0 and card.stages[index - 1].name == task
            parts.append(f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{6 if is_own else 3}" fill="{color}"/>')
    return "".join(parts)


def _stage_table(card: Scorecard) -> str:
    return _table(words.STAGE_COLUMNS, words.stage_rows(card))


def _references(card: Scorecard) -> str:
    if not card.references:
        return f'<h2>Other models</h2><p class="note">{words.NO_REFERENCES}</p>'
    rows = []
    for benchmark, model, score, conditions, source in words.comparison_rows(card):
        name = f"<b>{escape(model)}</b>" if model == "this run" else escape(model)
        notes = f'<td class="small">{escape(conditions)}</td><td class="small">{escape(source)}</td>'
        rows.append(f"<tr><td>{escape(benchmark)}</td><td>{name}</td>{_number(score)}{notes}</tr>")
    head = _head(("benchmark", "model", "score (percent)", "conditions", "status and source"))
    note = (
        '<p class="note">Scores that others reported, under their own conditions; compare only where split, shots and metric '
        "agree with ours.</p>"
    )
    return f'<h2>Other models</h2>{note}<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _packages(card: Scorecard) -> str:
    packages = card.run.get("packages")
    if not packages:
        return ""
    return "<h2>Software</h2>" + _table(("package", "version"), [(name, str(v)) for name, v in packages.items()])


def _reproduce(card: Scorecard) -> str:
    if not card.reproduce:
        return ""
    return "<h2>How to get these numbers again</h2><pre>" + escape("\n".join(card.reproduce)) + "</pre>"


def _head(names: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>" if any(names) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for row in rows:
        first, *rest = row
        cells = "".join(
            f'<td class="missing">{escape(cell)}</td>' if cell == words.NOT_MEASURED else f"<td>{escape(cell)}</td>"
            for cell in rest
        )
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{_head(head)}{"".join(lines)}</table></div>'
