"""What is known to go wrong with these datasets, one test for each defect; all rows here are made up."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import Any

import pytest

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor, preprocessor_names
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.data.sources import get_source, may_train
from tests.support.golden_rows import golden

MULTIPLE_CHOICE = [name for name in preprocessor_names() if get_source(name).kind == "multiple_choice"]
BESIDE_THE_CONTEXT = {"hellaswag", "truthfulqa"}  # docs/decisions/0040-choices-in-the-context.md


def own(name: str) -> list[Example]:
    return made(name, golden(name)["own"]["rows"])


def made(name: str, values: list[dict[str, Any]]) -> list[Example]:
    rows = [Row(f"own.jsonl:{number}", value) for number, value in enumerate(values, 1)]
    return list(get_preprocessor(name)(rows, SkipCounter()))


@pytest.mark.parametrize("name", preprocessor_names())
def test_every_dataset_yields_something_from_rows_of_its_schema(name):
    assert own(name)


@pytest.mark.parametrize("name", preprocessor_names())
def test_rows_given_one_group_at_a_time_yield_as_much_as_rows_given_at_once(name):
    from hsmn_dist.data.preprocessors.base import adjacent_columns

    columns = adjacent_columns(name)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, value in enumerate(golden(name)["own"]["rows"]):
        key = tuple(str(value.get(column)) for column in columns) if columns else number
        groups.setdefault(key, []).append(value)
    one_by_one = [example.target for group in groups.values() for example in made(name, group)]
    assert one_by_one == [example.target for example in own(name)]


@pytest.mark.parametrize("name", preprocessor_names())
def test_examples_have_the_kind_that_the_record_names(name):
    assert {example.kind for example in own(name)} == {get_source(name).kind}


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_a_multiple_choice_example_shows_its_choices_and_keeps_them_with_the_gold_index(name):
    for example in own(name):
        choices, gold = example.meta["choices"], example.meta["gold"]
        assert choices[gold] == example.target
        shown = [choice for choice in choices if choice in example.context]
        assert (shown == choices) is (name not in BESIDE_THE_CONTEXT)


@pytest.mark.parametrize("name", ["math", "open_r1_math", "gsm8k", "mathqa", "aqua_rat"])
def test_mathematics_is_not_called_code(name):
    assert {example.task for example in own(name)} == {"chat"}


@pytest.mark.parametrize("name", ["code_search_net", "human_eval", "mbpp", "apps", "codecontests", "code_alpaca"])
def test_code_is_not_called_chat(name):
    assert {example.task for example in own(name)} == {"code"}


def test_code_search_net_does_not_leak_the_docstring_into_the_target():
    assert all("Double a number" not in example.target for example in own("code_search_net"))
    assert "Double a number" in own("code_search_net")[0].context


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ('def f():\n    """Doc."""\n    return 1', "def f():\n    return 1"),
        ("def f():\n    'Doc.'; return 1", "def f():\n    return 1"),
        ('def f():\n    """Doc\n    more."""; x = 1\n    return x', "def f():\n    x = 1\n    return x"),
        ('def f(): "Doc."; return 1', "def f(): return 1"),
        ('def f(x="""a"""):\n    """Doc."""\n    return """b"""', 'def f(x="""a"""):\n    return """b"""'),
        ('async def f():\n    """D\u00e9j\u00e0."""  # why\n    await g()', "async def f():\n    # why\n    await g()"),
        ("def f():\n    return 1", "def f():\n    return 1"),
    ],
)
def test_only_the_docstring_is_cut_out_of_python_code(code, left):
    from hsmn_dist.data.preprocessors.code import cut_docstring

    assert cut_docstring(code) == left


def test_human_eval_keeps_the_indentation_of_the_solution_so_that_it_runs():
    example = own("human_eval")[0]
    scope: dict[str, Any] = {}
    exec(example.context + example.target + example.meta["tests"][0], scope)
    with pytest.raises((SyntaxError, AssertionError)):
        exec(example.context + example.target.strip() + example.meta["tests"][0], {})


@pytest.mark.parametrize("name", ["human_eval", "truthfulqa", "bbh", "bigbench_hard"])
def test_a_benchmark_with_one_split_never_trains(name):
    source = get_source(name)
    assert source.is_evaluation_only
    assert not any(may_train(source, split) for split in ("", "train", *source.splits))


def test_mmlu_does_not_train_on_the_split_that_it_is_scored_on():
    source = get_source("mmlu")
    assert source.evaluation_split == "test"
    assert not may_train(source, "test")
    assert may_train(source, "auxiliary_train")


def test_mbpp_shows_its_tests_so_the_name_of_the_function_can_be_known():
    example = own("mbpp")[0]
    assert example.meta["entry_point"] in example.context
    assert "\r" not in example.target + example.context
    assert "\n\treturn" in example.target


def test_gsm8k_learns_the_reasoning_and_keeps_the_answer_apart_without_commas():
    example = own("gsm8k")[0]
    assert example.target.startswith("Each box holds 12.")
    assert example.meta["answer"] == "1200"


def test_gsm8k_counts_1000_with_and_without_comma_as_one_answer():
    plain, comma = made("gsm8k", [{"question": "a", "answer": f"#### {number}"} for number in ("1000", "1,000")])
    assert plain.meta["answer"] == comma.meta["answer"] == "1000"


def test_open_r1_math_learns_a_verified_trace_and_never_a_refuted_one():
    example = own("open_r1_math")[0]
    assert example.meta["is_verified_trace"]
    assert "4?" not in example.target


def test_sciq_keeps_all_three_distractors_and_shuffles_by_the_question_alone():
    rows = [
        {
            "question": f"Question {number}?",
            "distractor1": "b",
            "distractor2": "c",
            "distractor3": "d",
            "correct_answer": "a",
            "support": "",
        }
        for number in range(200)
    ]
    golds = [example.meta["gold"] for example in made("sciq", rows)]
    assert golds == [example.meta["gold"] for example in made("sciq", rows)]
    assert {golds.count(place) > 25 for place in range(4)} == {True}


def test_stem_says_that_a_picture_is_missing():
    with_picture, without = own("stem")
    assert "[a picture that is not shown]" in with_picture.context
    assert with_picture.meta["has_picture"] is True
    assert "picture" not in without.context


def test_dialogues_say_who_speaks_and_split_by_dialogue():
    examples = own("daily_dialog")
    assert examples[1].context.splitlines() == ["Assistant: Is it raining ?", "User: A little .", "Assistant: "]
    assert len({example.group for example in examples}) == 1
    assert len({example.id for example in examples}) == 2


def test_personachat_uses_the_persona_and_the_history_of_the_row():
    example = own("personachat")[0]
    assert example.context.startswith("Persona: i bake bread. i own a boat.")
    assert "when do you bake ?" in example.context


def test_open_assistant_keeps_the_newest_turn_of_a_long_conversation_whole():
    rows = []
    parent = None
    for number in range(12):
        role = "assistant" if number % 2 else "prompter"
        rows.append(
            {
                "message_id": str(number),
                "parent_id": parent,
                "text": f"{number} " + "word " * 100,
                "role": role,
                "deleted": False,
                "message_tree_id": "0",
            }
        )
        parent = str(number)
    last = made("open_assistant", rows)[-1]
    assert f"User: {rows[10]['text'].strip()}\nAssistant: " in last.context
    assert all(f": {number} word" in last.context for number in range(11))
    assert {example.group for example in made("open_assistant", rows)} == {"0"}


def test_open_assistant_heeds_deleted_messages_ranks_and_languages():
    assert {example.id for example in own("open_assistant")} == {"a", "d"}
    assert own("open_assistant")[0].meta["rank"] == 0
    assert own("open_assistant")[0].meta["lang"] == "en"


def test_a_circle_of_parents_ends():
    rows = [
        {"message_id": a, "parent_id": b, "text": "x", "role": "assistant", "deleted": False, "message_tree_id": "t"}
        for a, b in (("1", "2"), ("2", "1"))
    ]
    assert made("open_assistant", rows) == []


def test_instruction_and_input_have_a_boundary():
    assert own("alpaca")[1].context == "Instruction: Translate.\nInput: Haus\nResponse: "
    assert own("dolly")[0].context.index("Instruction:") < own("dolly")[0].context.index("Input:")


@pytest.mark.parametrize(
    ("instruction", "task"),
    [
        ("What is the zip code of Paris?", "chat"),
        ("How do I scan a barcode?", "chat"),
        ("Explain the dress code of this club.", "chat"),
        ("Who wrote the Morse code?", "chat"),
        ("Where do pythons live?", "chat"),
        ("Describe the island of Java.", "chat"),
        ("Write a Python function to sort a list.", "code"),
        ("Write a script that renames files.", "code"),
        ("Give the SQL query for all customers.", "code"),
        ("Debug the following code.", "code"),
        ("```\nx = 1\n``` What does it do?", "code"),
    ],
)
def test_words_such_as_zip_code_do_not_make_a_task_code(instruction, task):
    row = {"instruction": instruction, "context": "", "response": "r", "category": None}
    assert made("dolly", [row])[0].task == task


def test_kjv_bible_loses_no_verse_and_groups_by_chapter():
    examples = own("kjv_bible")
    assert [example.target for example in examples] == ["One.", "Two.", "Four.", "Five.", "Six.", "New."]
    assert {example.group for example in examples} == {"Own 1", "Own 2"}


def test_hellaswag_counts_a_hidden_label_and_uses_the_activity():
    skipped = SkipCounter()
    rows = [Row("own.jsonl:3", golden("hellaswag")["own"]["rows"][2])]
    assert list(get_preprocessor("hellaswag")(rows, skipped)) == []
    assert skipped.counts == {"hidden label": 1}
    assert own("hellaswag")[0].context.startswith("Baking: ")


def test_apps_reads_json_text_and_never_learns_a_bracket():
    for example in own("apps"):
        assert not example.target.startswith("[")
    function = own("apps")[1]
    scope: dict[str, Any] = {}
    exec(function.target, scope)
    exec(function.meta["tests"][0], scope)
    with pytest.raises(AssertionError):
        exec(function.target.replace("a + b", "a - b") + "\n" + function.meta["tests"][0], {})


def test_apps_runs_a_method_of_a_solution_class_and_takes_tuples_for_lists():
    from hsmn_dist.data.preprocessors.code import function_test

    source = "class Solution:\n    def pair(self, a):\n        return (a, a)\n"
    exec(source + function_test("pair", [3], [[3, 3]]), {})
    exec(source + function_test("pair", [3], [3, 3]), {})
    with pytest.raises(AssertionError):
        exec(source + function_test("pair", [3], [3, 4]), {})


def test_apps_counts_a_number_of_many_thousand_digits_instead_of_stopping():
    row = dict(golden("apps")["own"]["rows"][0])
    row["input_output"] = '{"inputs": ["1"], "outputs": [' + "9" * 5000 + "]}"
    skipped = SkipCounter()
    assert list(get_preprocessor("apps")([Row("own.jsonl:1", row)], skipped)) == []
    assert skipped.counts == {"input_output is not JSON": 1}


def test_mathqa_learns_an_option_and_not_a_bare_letter():
    assert [example.target for example in own("mathqa")] == ["10 , 000", "12 cm"]


def test_strategyqa_keeps_facts_and_decomposition():
    assert own("strategyqa")[0].meta["facts"] == ["Tea is mostly water."]
    assert own("strategyqa")[0].meta["decomposition"] == ["What is tea made of?"]


def test_codecontests_learns_python_3_and_prints_nothing():
    printed = io.StringIO()
    with redirect_stdout(printed):
        examples = own("codecontests")
    assert [example.target for example in examples] == ["print(input())"]
    assert printed.getvalue() == ""
    assert [json.loads(test)["input"] for test in examples[0].meta["tests"]] == ["1\n", "2\n", "3\n", "4\n"]


def test_nq_open_keeps_every_right_answer():
    assert own("nq_open")[0].meta["answers"] == ["A. Writer", "Ann Writer"]


def test_natural_questions_reads_the_question_out_of_its_struct():
    assert "when do owls hunt" in own("natural_questions")[0].context


def test_aqua_rat_keeps_the_rationale_out_of_the_context():
    example = own("aqua_rat")[0]
    assert "Answer B" not in example.context
    assert example.meta["rationale"] == "3 + 4 = 7. Answer B"


def test_ultrafeedback_keeps_the_rejected_reply_and_both_scores():
    meta = own("ultrafeedback")[0].meta
    assert (meta["chosen"], meta["rejected"]) == ("A tit.", "A cat.")
    assert meta["score_chosen"] > meta["score_rejected"]


def test_bbh_keeps_the_name_of_its_task_where_the_reader_gives_it():
    assert [example.meta["task"] for example in own("bbh")] == ["", "word_sorting"]


def test_wikiqa_ranks_all_sentences_of_a_question():
    example = own("wikiqa")[0]
    assert len(example.meta["candidates"]) == 3
    assert example.meta["labels"] == [0, 1, 1]


def test_wizardlm_reads_the_column_output():
    assert own("wizardlm")[0].target == "Frozen water."


def test_owasp_reads_both_shapes():
    assert [example.target for example in own("owasp")] == ["A filter\nof packets.", "A repair."]


@pytest.mark.parametrize("name", preprocessor_names())
def test_a_missing_column_names_file_row_and_the_columns_found(name):
    from hsmn_dist.foundation.errors import DataError

    with pytest.raises(DataError) as caught:
        list(get_preprocessor(name)([Row("folder/rows.jsonl:7", {"nonsense": 1, "other": 2})], SkipCounter()))
    assert "folder/rows.jsonl:7" in caught.value.found
    assert "'nonsense', 'other'" in caught.value.found


@pytest.mark.parametrize("name", preprocessor_names())
def test_rows_whose_every_column_is_null_are_counted_and_never_raise_an_inner_signal(name):
    from hsmn_dist.foundation.errors import DataError

    skipped = SkipCounter()
    value = dict.fromkeys(golden(name)["own"]["rows"][0])
    try:
        examples = list(get_preprocessor(name)([Row("own.jsonl:1", value)], skipped))
    except DataError as error:  # a struct that is null is another type, not an empty one
        assert "own.jsonl:1" in error.found
    else:
        assert examples == []
        assert skipped.total == 1


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("arc_easy", ["choices"]),
        ("codecontests", ["solutions", "public_tests", "private_tests", "generated_tests"]),
        ("natural_questions", ["annotations"]),
    ],
)
def test_a_struct_of_lists_and_a_list_of_structs_give_the_same_example(name, columns):
    for value in golden(name)["own"]["rows"][:2]:
        turned = dict(value)
        for column in columns:
            lists = turned[column]
            turned[column] = [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
        if all(turned[column] for column in columns):
            same, other = made(name, [value]), made(name, [turned])
            assert [(e.context, e.target, e.meta) for e in same] == [(e.context, e.target, e.meta) for e in other]
