"""How contexts are worded."""

from __future__ import annotations

from itertools import pairwise

from hsmn_dist.data.preprocessors.wording import dialogue_context, instruction_context, question_context, turns_of


def test_a_question_has_its_choices_lettered_in_order():
    assert question_context(" Which? ", ["x", "y"]) == "Question: Which?\nA. x\nB. y\nAnswer: "


def test_a_passage_and_a_subject_stand_above_the_question():
    assert question_context("Q?", passage=" P. ", subject="S") == "Subject: S\nPassage: P.\nQuestion: Q?\nAnswer: "


def test_an_instruction_without_input_has_no_empty_input_line():
    assert instruction_context("Do it.", "  ") == "Instruction: Do it.\nResponse: "


def test_the_last_speaker_is_always_the_assistant():
    for number in range(1, 6):
        turns = turns_of([str(n) for n in range(number)])
        assert turns[-1]["role"] == "assistant"
        assert all(a["role"] != b["role"] for a, b in pairwise(turns))


def test_a_dialogue_keeps_every_turn_oldest_first():
    turns = [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "user", "text": "c"}]
    assert dialogue_context(turns, header="H") == "H\nUser: a\nAssistant: b\nUser: c\nAssistant: "
