"""Write a scorecard: .json, .md, .html and .png beside each other; read one back."""

from __future__ import annotations

from pathlib import Path

from hsmn_dist.evaluation.scorecard import Scorecard
from hsmn_dist.evaluation.scorecard_html import scorecard_html
from hsmn_dist.evaluation.scorecard_markdown import scorecard_markdown
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import read_json, write_json, write_text

SCORECARD_NAME = "scorecard.json"


def write_scorecard(card: Scorecard, folder: Path) -> dict[str, Path]:
    """Write the four files; the JSON comes last. Returns suffix ("json", "md", "html", "png") -> path."""
    from hsmn_dist.evaluation.figures import scorecard_figure  # matplotlib takes a second to import

    paths = {suffix: folder / f"scorecard.{suffix}" for suffix in ("json", "md", "html", "png")}
    write_text(paths["md"], scorecard_markdown(card))
    write_text(paths["html"], scorecard_html(card))
    scorecard_figure(card, paths["png"])
    write_json(paths["json"], card.to_json())
    return paths


def read_scorecard(path: Path) -> Scorecard:
    """Read `scorecard.json`, given itself or its folder.

    Raises:
        DataError: it is not there, or is of another schema version.
    """
    file = path / SCORECARD_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{file}: no scorecard",
            allowed="a run folder with a finished stage",
            action="see `hsmn-dist runs`, or let the run finish a stage",
        )
    return Scorecard.from_json(read_json(file))
