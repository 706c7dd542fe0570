"""The one parser of training and evaluation: every rule of its docstring, and what it must refuse."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kepo_core.data.records import AnswerOutcome
from kepo_core.task import rewards
from kepo_core.task.rewards import accuracy_reward, format_reward, reward_functions, score

RIGHT, WRONG = AnswerOutcome.CORRECT, AnswerOutcome.WRONG
MISSING, AMBIGUOUS, TRUNCATED = AnswerOutcome.MISSING, AnswerOutcome.AMBIGUOUS, AnswerOutcome.TRUNCATED


@pytest.fixture(autouse=True)
def nothing_read_before() -> None:
    """Clear what another test's call has cached."""
    rewards._read.cache_clear()
    rewards._has_format.cache_clear()


def outcome(text: str, answer: str = "B", letters: str = "ABCD", finished: bool = True) -> AnswerOutcome:
    return score(text, answer, letters, thinking=True, finished=finished).outcome


@pytest.mark.parametrize(
    "field",
    ["B", " B ", "b", "B.", "B)", "(B)", "(b).", "\nB\n", "B B", "B, B", "**B**", "_B_", "B) the liver", "B: a mass",
     "B. A type A lesion", "(B) vitamin D", "b) no", "B) E. coli", "B. Grade I. Mild", "B) stained (H&E)"],
)  # fmt: skip
def test_a_field_with_one_letter_is_that_letter(field: str) -> None:
    assert outcome(f"<answer>{field}</answer>") is RIGHT
    assert outcome(f"<answer>{field}</answer>", answer="C") is WRONG


@pytest.mark.parametrize(
    "field",
    ["A or B", "A and B", "a or b", "a AND b", "A, B", "A/B", "a b", "B) or C)", "B. liver C. lung", "A) or B",
     "either A or B", "B: yes and C", "A or B or C", "B) a mass, C", "B. liver; (C)", "B: a mass/A", "B. Wait, C."],
)  # fmt: skip
def test_several_letters_in_one_field_are_ambiguous(field: str) -> None:
    for right in "ABC":
        assert outcome(f"<answer>{field}</answer>", answer=right) is AMBIGUOUS


def test_several_fields() -> None:
    assert outcome("<answer>B</answer><answer>C</answer>") is AMBIGUOUS
    assert outcome("<answer>C</answer><answer>B</answer>") is AMBIGUOUS
    assert outcome("<answer>B</answer> then <answer>b.</answer>") is RIGHT
    assert outcome("<answer>who knows</answer><answer>B</answer>") is RIGHT


@pytest.mark.parametrize(
    "field", ["", " ", "a mass", "the liver", "unknown", "E", "e", "7", "BB", "Bé", "The answer is B"]
)
def test_a_field_without_one_option_letter_is_missing(field: str) -> None:
    assert outcome(f"<answer>{field}</answer>") is MISSING


def test_a_letter_beyond_the_options_is_missing_but_still_contradicts_another() -> None:
    assert outcome("<answer>C</answer>", answer="A", letters="AB") is MISSING
    assert outcome("<answer>A or C</answer>", answer="A", letters="AB") is AMBIGUOUS
    assert score("<answer>C</answer>", "A", "AB", thinking=False, finished=True).letter == ""


def test_an_answer_inside_the_reasoning_does_not_count() -> None:
    assert outcome("<think><answer>B</answer></think>") is MISSING
    assert outcome("<think>maybe <answer>C</answer></think><answer>B</answer>") is RIGHT
    assert outcome("<think>never closed <answer>B</answer>") is MISSING
    assert outcome("opened in the prompt <answer>C</answer></think><answer>B</answer>") is RIGHT
    assert outcome("<think>one</think><answer>B</answer><think>two <answer>C</answer></think>") is RIGHT
    assert outcome("<answer><think>one</think>B</answer>") is RIGHT


def test_nested_fields_count_by_the_innermost() -> None:
    assert outcome("<answer><answer> B </answer></answer>") is RIGHT


def test_only_an_unfinished_completion_without_a_closed_field_is_truncated() -> None:
    assert outcome("<think>so", finished=False) is TRUNCATED
    assert outcome("<think>so</think><answer>B", finished=False) is TRUNCATED
    assert outcome("<think>so</think><answer>B") is MISSING
    assert outcome("<answer>?</answer> and on", finished=False) is MISSING
    assert outcome("<answer>B</answer> and on", finished=False) is RIGHT
    assert outcome("<answer>A or B</answer> and on", finished=False) is AMBIGUOUS
    assert outcome("", finished=False) is TRUNCATED
    assert outcome("") is MISSING


@pytest.mark.parametrize("text", ["<answer>A or B</answer>", "<answer>E</answer>", "<answer>?</answer>", "<answer>B"])
def test_without_an_answer_there_is_no_letter(text: str) -> None:
    scored = score(text, "B", "ABCD", thinking=True, finished=False)
    assert scored.outcome not in (RIGHT, WRONG) and scored.letter == ""


@pytest.mark.parametrize(
    "text",
    ["<think>so</think><answer>B</answer>", "  <think>so\nit</think>\n<answer>\nB\n</answer>\n",
     "<think>so</think><answer>A or B</answer>", "<think></think><answer></answer>"],
)  # fmt: skip
def test_thinking_format(text: str) -> None:
    assert score(text, "B", "ABCD", thinking=True, finished=True).format_ok
    assert not score(text, "B", "ABCD", thinking=False, finished=True).format_ok


@pytest.mark.parametrize(
    "text",
    ["<answer>B</answer>", "x<think>so</think><answer>B</answer>", "<think>so</think>x<answer>B</answer>",
     "<think>so</think><answer>B</answer>x", "<answer>B</answer><think>so</think>",
     "<think>so</think><answer>B</answer><answer>B</answer>", "<think>so</think><think>so</think><answer>B</answer>",
     "<think>so<answer>B</answer></think>", "<think>so</think><answer>B", "<think>so <answer>B</answer></think>",
     "<Think>so</Think><answer>B</answer>", "</think>so<think><answer>B</answer>",
     "<think><think>so</think><answer>B</answer>", "B", ""],
)  # fmt: skip
def test_what_is_not_the_thinking_format(text: str) -> None:
    assert not score(text, "B", "ABCD", thinking=True, finished=True).format_ok


def test_non_thinking_format() -> None:
    def ok(text: str) -> bool:
        return score(text, "B", "ABCD", thinking=False, finished=True).format_ok

    assert ok("<answer>B</answer>") and ok(" \n<answer> nothing </answer> ")
    assert not ok("B") and not ok("It is <answer>B</answer>") and not ok("<answer>B</answer><answer>B</answer>")


def test_accuracy_and_format_are_independent() -> None:
    table = {
        "<think>t</think><answer>B</answer>": (1.0, True),
        "<think>t</think><answer>C</answer>": (0.0, True),
        "I say <answer>B</answer>": (1.0, False),
        "B": (0.0, False),
    }
    for text, (accuracy, format_ok) in table.items():
        scored = score(text, "B", "ABCD", thinking=True, finished=True)
        assert (scored.accuracy, scored.format_ok) == (accuracy, format_ok)
    letters = [score(text, "B", "ABCD", thinking=True, finished=True).letter for text in table]
    assert letters == ["B", "C", "B", ""]


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "A", "b", "E", " or ", ".", ")", "x", "\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(deadline=None)
def test_any_text_gets_exactly_one_outcome_and_a_letter_only_when_one_was_read(text: str) -> None:
    for finished in (True, False):
        scored = {right: score(text, right, "AB", thinking=True, finished=finished) for right in "AB"}
        letters = {s.letter for s in scored.values()}
        assert len(letters) == 1
        letter = letters.pop()
        correct = [right for right, s in scored.items() if s.outcome is RIGHT]
        assert correct == ([letter] if letter else [])
        if not letter:
            assert all(s.outcome in (MISSING, AMBIGUOUS, TRUNCATED) for s in scored.values())
        # appending white space or finishing changes neither the letter nor the format
        padded = score(f" {text}\n", "A", "AB", thinking=True, finished=True)
        assert (padded.letter, padded.format_ok) == (scored["A"].letter, scored["A"].format_ok)


@pytest.mark.parametrize(("answer", "letters"), [("E", "ABCD"), ("", "AB"), ("AB", "ABC"), ("a", "AB")])
def test_a_wrong_key_is_an_error_and_not_a_reward_of_zero(answer: str, letters: str) -> None:
    with pytest.raises(ValueError, match="option letters"):
        score("<answer>A</answer>", answer, letters, thinking=True, finished=True)


def test_trl_reward_functions_read_chat_and_plain_completions() -> None:
    texts = ["<think>t</think><answer>B</answer>", "<answer>B</answer>", "<think>t</think><answer>A</answer>"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"answer": ["B", "A", "A"], "options": [["x", "y"], ["x", "y"], ["x", "y", "z"]]}
    for completions in (texts, chats):
        assert accuracy_reward(completions, **columns, log_extra=None) == [1.0, 0.0, 1.0]
        assert format_reward(completions, **columns) == [1.0, 0.0, 1.0]
        assert format_reward(completions, thinking=False, **columns) == [0.0, 1.0, 0.0]
    in_two = [{"role": "assistant", "content": part} for part in ("<think>t</think>", "<answer>B</answer>")]
    assert format_reward([in_two]) == [1.0]


def test_options_bound_the_letters_of_each_row() -> None:
    completions = ["<answer>C</answer>"] * 2
    with pytest.raises(ValueError, match="option letters A, B"):
        accuracy_reward(completions, answer=["C", "C"], options=[["x", "y", "z"], ["x", "y"]])


def test_reward_functions_keep_order_names_and_mode() -> None:
    accuracy, formatted = reward_functions(thinking=False)
    assert (accuracy.__name__, formatted.__name__) == ("accuracy_reward", "format_reward")
    assert formatted(["<answer>B</answer>"], answer=["B"]) == [1.0]
    assert reward_functions(thinking=True)[1](["<answer>B</answer>"]) == [0.0]


@pytest.mark.parametrize("broken", [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}]])
def test_a_completion_without_text_raises(broken: list) -> None:
    with pytest.raises(TypeError, match="completion"):
        rewards.completion_text(broken)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError):
        accuracy_reward(["<answer>A</answer>"], answer=["A", "B"], options=[["x", "y"]] * 2)


# The options' own words ---------------------------------------------------------------------------------------------

CYSTS = ("a cyst", "a tear", "a mass", "nothing")
NUMERALS = ("I", "II", "III", "IV")
KINDS = ("R", "L", "both R and L")
FORMS = ("Hepatitis A", "Hepatitis B", "Hepatitis A, B or C", "Both A and B")
GERMS = ("C. albicans", "E. coli", "B. fragilis", "S. aureus")
GROUPS = ("AB", "A", "O", "B")


def read(field: str, options: tuple[str, ...], answer_format: str = "paper") -> str:
    """The letter that is read from an answer field, or else the outcome."""
    found = score(f"<answer>{field}</answer>", "A", options, thinking=False, finished=True, answer_format=answer_format)
    return found.letter or found.outcome.value


@pytest.mark.parametrize("answer_format", ["paper", "lenient"])
@pytest.mark.parametrize("options", [CYSTS, NUMERALS, FORMS, GERMS, KINDS])
def test_an_options_line_and_text_name_that_option_and_no_other(options, answer_format) -> None:
    for letter, text in zip("ABCD", options, strict=False):
        lines = [f"{letter}) {text}", f"{letter}. {text}.", f"({letter}) {text}", f" {letter}:  {text.upper()}"]
        for said in (*lines, text, text.swapcase(), f"{text}."):
            assert read(said, options, answer_format) == letter, said


def test_the_words_of_an_option_name_no_other_beside_more_words() -> None:
    assert read("C) Hepatitis A, B or C, as said", FORMS) == "C"
    assert read("D) Both A and B because of both", FORMS) == "D"
    assert read("C. albicans, most likely", GERMS) == "missing"
    assert read("B) E. coli rather than C. albicans", GERMS) == "B"
    assert read("A) a cyst, B) a tear", CYSTS) == "ambiguous"
    assert read("C. albicans or E. coli", GERMS) == "missing"
    assert read("Hepatitis A, B or C, D", FORMS) == "missing"


@pytest.mark.parametrize("answer_format", ["paper", "lenient"])
def test_spaces_beside_a_mark_change_no_options_text(answer_format: str) -> None:
    for said in ("C.albicans", "c.albicans", "C . albicans", "A)C.albicans"):
        assert read(said, GERMS, answer_format) == "A"
    assert read("D) Hepatitis A,B or C", FORMS, answer_format) == "ambiguous"
    assert read("acyst", CYSTS, answer_format) == read("C.albicans, most likely", GERMS, answer_format) == "missing"


def test_a_letter_counts_before_a_text_and_two_that_contradict_are_ambiguous() -> None:
    assert [read(group, GROUPS) for group in ("AB", "A", "O", "B", "E")] == ["A", "A", "C", "B", "missing"]
    assert read("B) a cyst", CYSTS) == "ambiguous"
    assert read("C) C. albicans", GERMS) == "ambiguous"
    assert read("C. albicans", ("C. albicans", "none", "albicans")) == "ambiguous"  # A's text and C's line


def test_a_reward_function_reads_the_words_of_its_row() -> None:
    fields = ["<answer>C. albicans</answer>", "<answer>A) I</answer>"]
    assert accuracy_reward(fields, answer=["C", "A"], options=[GERMS, NUMERALS]) == [0.0, 1.0]


@pytest.mark.parametrize(
    "text",
    [r"\boxed{B}", r"Thus $\boxed{\text{B}}$.", "Option B", "The answer is B.", "**B) a tear**", "<Answer>B</Answer>",
     "< answer >B</ ANSWER >", "<answer>Ｂ：a tear</answer>", "<answer>（Ｂ）</answer>", "<answer>Option B</answer>",
     "<answer>The correct answer is B) a tear.</answer>", "It tears.\n\n**Answer:** B", "The final answer is a tear.",
     "B", "a tear", "answer: (B), because it is torn", "<Think>A?</Think>\n<answer>B</answer>", "<answer>B",
     "I see C. albicans.\nAnswer: B"],
)  # fmt: skip
def test_what_other_families_write_is_read_where_the_switch_says_so(text: str) -> None:
    def found(answer_format: str) -> AnswerOutcome:
        return score(text, "B", CYSTS, thinking=True, finished=True, answer_format=answer_format).outcome

    assert found("lenient") is RIGHT
    assert found("paper") is (RIGHT if text.endswith("\n<answer>B</answer>") else MISSING)
    assert accuracy_reward([text], answer=["B"], options=[CYSTS], answer_format="lenient") == [1.0]
    assert reward_functions(True, "lenient")[0]([text], answer=["B"], options=[CYSTS]) == [1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is A or B", AMBIGUOUS),
        ("A) a cyst\nB) a tear\nC) a mass", AMBIGUOUS),
        (r"\boxed{A} or \boxed{B}", AMBIGUOUS),
        ("The answer is A.\nNo, the answer is B.", AMBIGUOUS),
        ("the answer is a large thing", MISSING),
        ("The answer is B. Wait, the answer is A.", AMBIGUOUS),
        ("The answer is a tear. No: the answer is A", AMBIGUOUS),
        ("The answer is a tear, no, the answer is A", AMBIGUOUS),
        ("The answer is a tear, a cyst or a mass", AMBIGUOUS),
        ("The answer is a tear, or A", AMBIGUOUS),
        ("The answer is a THİNG, or A", MISSING),
        ("The answer is A. Wait, B.", AMBIGUOUS),
        ("The answer is B.\n\nWait, it is too dark for that: a mass.", AMBIGUOUS),
        ("The answer is a tear. Actually, I mean A", AMBIGUOUS),
        ("Answer: B. No, A is better.", AMBIGUOUS),
        ("The answer is B. Hmm, B it is.", RIGHT),
        ("The answer is B. No other option is as dark.", RIGHT),
        ("Wait, A is too dark. The answer is B.", RIGHT),
        ("The answer is B, as the mass of A would be seen.", RIGHT),
        ("<answer>B. Wait, A fits better.</answer>", AMBIGUOUS),
        ("<answer>a tear, no, a mass</answer>", MISSING),
        ("The answer is B.\n\nOption A", AMBIGUOUS),
        ("The answer is B.\n\n**B) a tear**", RIGHT),
        ("The answer is B; A", AMBIGUOUS),
        ("A) a cyst\nB) a tear\nC) a mass\nThe answer is B.", RIGHT),
        ("The answer is B. $\\boxed{A}$", AMBIGUOUS),
        ("\\boxed{B}: the answer is B", RIGHT),
        ("The answer is a tear. It is dark.", RIGHT),
        ("The answer is a cyst. It is dark. The answer is B.", AMBIGUOUS),
        ("Option: B. Better choice: C) a mass. Answer: B", AMBIGUOUS),
        ("Which answer is right? The answer is not A. The answer is B.", RIGHT),
        ("B) Liver is excluded, since it is dark.", MISSING),
        ("B: the liver\nC. the spleen", MISSING),
        ("A) is too dark.\nB", RIGHT),
        ("B) a tear, perhaps", MISSING),
        ("B\nor C", AMBIGUOUS),
        ("B) or A)\nB", AMBIGUOUS),
        ("B) a cyst", AMBIGUOUS),
        ("The answer is not B", MISSING),
        ("Option B is not what I see, and a tear is unlikely", MISSING),
        ("<answer>who knows</answer> \\boxed{B}", MISSING),
        ("<think>The answer is B", MISSING),
        ("The answer is E", MISSING),
        ("The answer is a cyst", WRONG),
    ],
)
def test_lenient_is_not_credulous(text: str, expected: AnswerOutcome) -> None:
    assert score(text, "B", CYSTS, thinking=True, finished=True, answer_format="lenient").outcome is expected


@pytest.mark.parametrize("write", ["{}", "<answer>{}</answer>", "**{}**", "The answer is {}.", "\\boxed{{{}}}"])
@pytest.mark.parametrize(
    "options",
    [("Option B", "Option A"), ("Choice: B", "Answer A"), ("HLA-B*27", "HLA-B27"), ("D#", "$10", "10"),
     ("CD4 __A__", "CD4 `B`")],
)  # fmt: skip
def test_an_options_text_is_no_word_before_an_answer_and_no_ornament(options, write: str) -> None:
    for letter, text in zip("ABC", options, strict=False):
        said = write.format(text)
        found = score(said, "A", options, thinking=True, finished=True, answer_format="lenient")
        assert (found.letter or found.outcome) == letter, said


def test_an_option_that_waits_takes_no_answer_back() -> None:
    options = ("wait and see", "no, never", "B cells", "instead of A")
    for letter, option in zip("ABCD", options, strict=True):
        for said in (f"The answer is {option}.", f"The answer is {letter}) {option}", f"<answer>{option}</answer>"):
            found = score(said, letter, options, thinking=True, finished=True, answer_format="lenient")
            assert found.outcome is RIGHT, said


def test_a_lenient_answer_is_truncated_only_where_none_was_read() -> None:
    def found(text: str) -> AnswerOutcome:
        return score(text, "B", CYSTS, thinking=True, finished=False, answer_format="lenient").outcome

    assert [found(text) for text in ("I see", "The answer is", "The answer is B. I", "<Answer>?</Answer>")] == [
        TRUNCATED, TRUNCATED, RIGHT, MISSING,
    ]  # fmt: skip


def test_an_unknown_answer_format_is_named() -> None:
    with pytest.raises(ValueError, match="answer_format is 'strict', expected one of paper, lenient"):
        score("<answer>B</answer>", "B", CYSTS, thinking=True, finished=True, answer_format="strict")


PHRASES = [*PIECES, "a cyst", "a tear", "B) ", "\\boxed{", "}", "The answer is ", "Option ", "**", "Ｂ", " " * 9]


@given(st.lists(st.sampled_from(PHRASES), max_size=12).map("".join), st.booleans())
@settings(deadline=None)
def test_lenient_gives_one_of_the_five_outcomes_and_the_papers_format(text: str, finished: bool) -> None:
    paper, lenient = (
        score(text, "A", CYSTS, thinking=True, finished=finished, answer_format=name) for name in ("paper", "lenient")
    )
    assert paper.format_ok == lenient.format_ok
    assert bool(lenient.letter) == (lenient.outcome in (RIGHT, WRONG))


@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "</think>",
        "<think></think>",
        "<answer>",
        "<answer>A",
        "\\boxed{",
        "answer is ",
        "answer is A. ",
        "answer is A. Wait, ",
        "B\n",
        "wait ",
        "A, ",
        "< ",
        "(",
    ],
)
@pytest.mark.parametrize("answer_format", ["paper", "lenient"])
def test_a_text_is_read_in_time_that_grows_as_it_does(piece: str, answer_format: str) -> None:
    """A quadratic parser took seconds for these."""
    for text in (piece * 8000, f"<answer>{piece * 8000}</answer>", piece + " " * 60_000 + piece):
        start = time.process_time()
        score(text, "B", CYSTS, thinking=True, finished=True, answer_format=answer_format)
        assert time.process_time() - start < 0.5
