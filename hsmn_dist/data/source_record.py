"""The typed record of a dataset. The 33 records stand in `source_questions.py` and `source_texts.py`.

Columns and types are the hub's own, read from its loaders, saved files and cards. Revisions are pinned at preparation,
in the index, and not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsmn_dist.data.example import Kind

LicenceClass = Literal["permissive", "share-alike", "non-commercial", "unclear"]
RealRows = Literal["many", "few", "none"]


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """One dataset.

    Attributes:
        name: the name in a configuration; also the preprocessor's.
        hub_id: what `datasets.load_dataset` is given; "" for a dataset that is not on the hub.
        configurations: hub configurations, the default first; empty when there is none to choose.
        is_split_by_configuration: the configurations are parts of one dataset, and all of them are read.
        splits: hub split -> number of rows, 0 where the number is not known.
        train_splits: splits that may train. Empty: evaluation only.
        evaluation_split: the split that is scored; "" when a part held out of the training rows is scored.
        columns: column -> type, as the hub gives them.
        licence: as stated by the publisher.
        licence_class: what that means for a user.
        kind: how its examples are scored (see `Example`).
        metric: the benchmark's own measure.
        is_benchmark: scores on it are compared with those of other models.
        group: what an example's `group` is, and so what never crosses a split.
        paper: where it was published.
        note: what one should know, and what our preprocessor does not do.
        real_rows: how many real rows the preprocessor was run on ("none": only rows made up after the schema).
    """

    name: str
    hub_id: str
    splits: dict[str, int]
    train_splits: tuple[str, ...]
    evaluation_split: str
    columns: dict[str, str]
    licence: str
    licence_class: LicenceClass
    kind: Kind
    metric: str
    is_benchmark: bool
    group: str
    paper: str
    configurations: tuple[str, ...] = ()
    is_split_by_configuration: bool = False
    note: str = ""
    real_rows: RealRows = "many"

    @property
    def is_evaluation_only(self) -> bool:
        """No split of it may train: human_eval, truthfulqa, bbh."""
        return not self.train_splits

    @property
    def default_configuration(self) -> str:
        """The hub configuration to use unless another is asked for; "" when there is none."""
        return self.configurations[0] if self.configurations else ""
