"""A study's report: verdicts with their numbers, and which way of EWC should be the default."""

from __future__ import annotations

from hsmn_dist.config.continual import ContinualConfig
from hsmn_dist.config.study import StudyConfig
from hsmn_dist.orchestration.study_report import VariantLine, study_markdown

STUDY = StudyConfig(name="s", base="b.yaml", variants={"none": ("continual.method=none",)})
DEFAULT = ContinualConfig().fisher.estimator
OTHER = "sampled_sum"


def line(variant: str, end: float, learning: float | None, forgetting: float | None, **continual) -> VariantLine:
    def pair(value: float | None) -> list[float] | None:
        return None if value is None else [value - 0.1, value + 0.1]

    settings = ContinualConfig.model_validate({"method": "none", **continual})
    return VariantLine(variant, settings, [0, 1], [end - 0.1, end + 0.1], pair(learning), pair(forgetting))


def ewc(variant: str, estimator: str, end: float, learning: float, forgetting: float) -> VariantLine:
    return line(variant, end, learning, forgetting, method="ewc", strength=7.0, fisher={"estimator": estimator})


NONE = line("none", 6.0, 2.0, 4.0)
JOINT = line("joint", 1.9, None, None, method="joint")


def test_verdicts_compare_forgetting_and_learning_with_the_reference() -> None:
    good, slow = ewc("good", DEFAULT, 3.0, 2.08, 1.0), ewc("slow", OTHER, 2.9, 2.4, 0.4)
    text = study_markdown(STUDY, [NONE, good, slow, JOINT])
    assert "| none | none | the reference | 2 | 6.000 +- 0.141 | 2.000 +- 0.141 | 4.000 +- 0.141 |" in text
    assert "forgets 25% of it (at most half: yes); learns +4.0% (at most +5%: yes)" in text
    assert "forgets 10% of it (at most half: yes); learns +20.0% (at most +5%: no)" in text
    assert "| joint | joint | no order of tasks | 2 | 1.900 +- 0.141 | - | - |" in text
    assert f"ewc, {OTHER}, coupled, 7" in text
    assert "Lowest end loss of the sequential methods: slow" in text


def test_the_best_way_within_both_limits_is_named_and_set_beside_the_default() -> None:
    kept, better = ewc("kept", DEFAULT, 3.0, 2.08, 1.0), ewc("better", OTHER, 2.7, 2.08, 0.9)
    replay = line("replay", 2.0, 2.0, 0.0, method="replay")
    outside = ewc("outside", OTHER, 2.5, 2.2, 0.1)
    text = study_markdown(STUDY, [NONE, kept, better, outside, replay])
    assert "(`kept`, `better`), `better` is the best" in text and f"the default is estimator `{DEFAULT}`" in text
    assert f"Estimator `{DEFAULT}`, application `coupled` should be the default, and is." in study_markdown(
        STUDY, [NONE, kept]
    )


def test_of_equal_ways_the_one_that_learns_best_is_named() -> None:
    lowest, near = ewc("lowest", OTHER, 2.90, 2.09, 0.9), ewc("near", DEFAULT, 3.0, 2.02, 1.0)
    text = study_markdown(STUDY, [NONE, lowest, near])
    assert (
        "`near` is the best: end loss 3.000 +- 0.141, equal within one standard deviation to that of `lowest`" in text
    )


def test_no_way_within_both_limits_changes_no_default() -> None:
    text = study_markdown(STUDY, [NONE, ewc("outside", OTHER, 2.5, 2.2, 0.1)])
    assert "No way of EWC alone is within both limits" in text
    assert "not measured" in study_markdown(STUDY, [ewc("alone", OTHER, 2.5, 2.2, 0.1)])
