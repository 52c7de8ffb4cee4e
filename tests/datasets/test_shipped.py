"""The data files that ship with the package are well-formed and say what they claim to say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "mia" / "data"
TASKS = DATA / "tasks"
CONTRAST = DATA / "contrast"
INDEX: dict[str, Any] = json.loads((TASKS / "index.json").read_text(encoding="utf-8"))
ENTRIES: list[dict[str, Any]] = INDEX["tasks"]
NAMES = [entry["name"] for entry in ENTRIES]
FAMILIES = {"knowledge", "language", "linguistic", "algorithmic", "symmetric"}
LOW = "abcdefghijklmnopqrstuvwxyz"


def rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") and "\r" not in text
    return [json.loads(line) for line in text.splitlines()]


def outputs(row: dict[str, Any]) -> list[str]:
    out = row["output"]
    return out if isinstance(out, list) else [out]


def task(name: str) -> list[tuple[str, list[str]]]:
    return [(row["input"], outputs(row)) for row in rows(TASKS / f"{name}.jsonl")]


def lines(name: str) -> list[str]:
    text = (CONTRAST / name).read_text(encoding="utf-8")
    assert text.endswith("\n") and "\r" not in text
    return text.splitlines()


def clean(text: str) -> bool:
    """No stray or double spaces, no line breaks, nothing empty."""
    return bool(text) and text == " ".join(text.split())


# tasks


def test_index_and_files_agree() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 16
    assert {path.stem for path in TASKS.glob("*.jsonl")} == set(NAMES)
    assert {entry["family"] for entry in ENTRIES} == FAMILIES
    assert INDEX["default_prompt"].format(input="in", output="out") == "Q: in\nA: out\n\n"
    for entry in ENTRIES:
        assert clean(entry["description"]), entry["name"]
        assert entry["count"] == len(task(entry["name"])) >= 50, entry["name"]


def test_tasks_meant_for_many_queries_are_large() -> None:
    counts = {entry["name"]: entry["count"] for entry in ENTRIES}
    for name, least in (("country_capital", 130), ("antonym", 150), ("uppercase", 150)):
        assert counts[name] >= least, name


@pytest.mark.parametrize("name", NAMES)
def test_task_is_well_formed(name: str) -> None:
    inputs = []
    for row in rows(TASKS / f"{name}.jsonl"):
        assert set(row) == {"input", "output"}
        outs = outputs(row)
        assert not isinstance(row["output"], list) or len(outs) > 1, row
        assert len(set(outs)) == len(outs), row
        assert all(isinstance(text, str) and clean(text) for text in [row["input"], *outs]), row
        inputs.append(row["input"])
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("list_")])
def test_output_is_not_the_input(name: str) -> None:
    assert all(i not in outs for i, outs in task(name))


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("uppercase", lambda s: s.upper()),
        ("capitalize", lambda s: s[0].upper() + s[1:]),
        ("first_letter", lambda s: s[0]),
        ("last_letter", lambda s: s[-1]),
        ("reverse_digits", lambda s: s[::-1]),
        ("next_letter", lambda s: chr(ord(s) + 1)),
        ("next_number", lambda s: str(int(s) + 1)),
        ("list_first", lambda s: s.split(", ")[0]),
        ("list_last", lambda s: s.split(", ")[-1]),
        ("list_first_upper", lambda s: s.split(", ")[0].upper()),
        ("list_last_upper", lambda s: s.split(", ")[-1].upper()),
        ("list_first_country", lambda s: s.split(", ")[0]),
        ("list_last_country", lambda s: s.split(", ")[-1]),
    ],
)
def test_mechanical_outputs(name: str, want: Any) -> None:
    for text, outs in task(name):
        assert outs == [want(text)], text


def test_mechanical_inputs() -> None:
    assert all(len(i) == 1 and i not in "zZ" and i.lower() in LOW for i, _ in task("next_letter"))
    assert all(re.fullmatch(r"\d( \d){2,4}", i) and i != i[::-1] for i, _ in task("reverse_digits"))
    for name in ("uppercase", "capitalize", "first_letter", "last_letter"):
        assert all(re.fullmatch(r"[a-z]{3,}", i) for i, _ in task(name)), name


def test_next_and_previous_item_are_inverse() -> None:
    after = {i: outs[0] for i, outs in task("next_item")}
    before = {i: outs[0] for i, outs in task("previous_item")}
    assert set(after.items()) == {(a, b) for b, a in before.items()}
    assert after["Sunday"] == "Monday" and after["December"] == "January"
    assert after["nineteen"] == "twenty" and after["y"] == "z" and after["8"] == "9"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("list_")])
def test_lists_have_three_to_five_distinct_items(name: str) -> None:
    pairs = task(name)
    assert len(pairs) >= 80
    sizes = set()
    for text, _ in pairs:
        items = text.split(", ")
        assert len(set(items)) == len(items)
        sizes.add(len(items))
    assert sizes == {3, 4, 5}


def test_list_capitals_agree_with_country_capital() -> None:
    capital = dict(task("country_capital"))
    for name, end in (("list_first_capital", 0), ("list_last_capital", -1)):
        for text, outs in task(name):
            assert outs == capital[text.split(", ")[end]], text


def test_picked_item_is_in_its_list() -> None:
    animals = {i for i, _ in task("animal_class")}
    for name in ("list_animal", "list_color"):
        pool = {outs[0] for _, outs in task(name)}
        for text, outs in task(name):
            items = text.split(", ")
            assert len(outs) == 1 and [x for x in items if x in pool] == outs, text
            if name == "list_animal":
                assert [x for x in items if x in animals] in ([], outs), text


def test_compositions_share_their_inputs() -> None:
    assert len(INDEX["compositions"]) >= 2
    for comp in INDEX["compositions"]:
        parts = [comp[key] for key in ("AC", "BC", "BD", "AD")]
        assert len(set(parts)) == 4 and set(parts) <= set(NAMES)
        first, *rest = ([i for i, _ in task(part)] for part in parts)
        assert all(other == first for other in rest), comp["name"]


def test_symmetric_task_has_both_directions_and_no_country_twice() -> None:
    capital = dict(task("country_capital"))
    forward, backward = [], []
    for text, outs in task("country_capital_sym"):
        if text in capital:
            assert outs == capital[text]
            forward.append(text)
        else:
            assert len(outs) == 1 and text == capital[outs[0]][0]
            backward.append(outs[0])
    assert len(forward) == len(backward) >= 40
    assert not set(forward) & set(backward)


def test_no_antonym_pair_in_both_directions() -> None:
    pairs = Counter(frozenset((i, out)) for i, outs in task("antonym") for out in outs)
    assert max(pairs.values()) == 1


OECD = """Australia, Austria, Belgium, Canada, Chile, Colombia, Costa Rica, Czech Republic, Denmark,
Estonia, Finland, France, Germany, Greece, Hungary, Iceland, Ireland, Israel, Italy, Japan, Latvia,
Lithuania, Luxembourg, Mexico, Netherlands, New Zealand, Norway, Poland, Portugal, Slovakia,
Slovenia, South Korea, Spain, Sweden, Switzerland, Turkey, United Kingdom, United States"""
G20_TOO = "Argentina, Brazil, China, India, Indonesia, Russia, Saudi Arabia, South Africa"
EU_TOO = "Bulgaria, Croatia, Cyprus, Malta, Romania"
OVER_100_MILLION_TOO = """Bangladesh, Democratic Republic of the Congo, Egypt, Ethiopia, Nigeria,
Pakistan, Philippines, Vietnam"""


def test_known_capitals_are_by_the_rule_in_the_description() -> None:
    entry = {e["name"]: e for e in ENTRIES}
    known, every = dict(task("country_capital_known")), dict(task("country_capital"))
    rule = re.split(r",\s", ", ".join((OECD, G20_TOO, EU_TOO, OVER_100_MILLION_TOO)))
    left_out = set(rule) - set(known)
    assert set(known) <= set(rule) and left_out == {"South Africa", "Israel", "Luxembourg"}
    assert all(c in entry["country_capital_known"]["description"] for c in left_out)
    assert not left_out & set(every) and known.items() <= every.items()
    assert f"{len(every)} countries" in entry["country_capital"]["description"]


@pytest.mark.parametrize(
    ("name", "text", "also"),
    [
        ("person_profession", "Michael Jordan", {"athlete", "basketball player"}),
        ("person_profession", "Serena Williams", {"athlete", "tennis player"}),
        ("person_profession", "Margaret Thatcher", {"politician", "prime minister"}),
        ("person_profession", "Winston Churchill", {"politician", "prime minister"}),
        ("person_profession", "Angela Merkel", {"politician", "chancellor"}),
        ("person_profession", "Alan Turing", {"mathematician", "computer scientist"}),
        ("person_profession", "Walter Cronkite", {"journalist", "broadcaster", "anchor"}),
        ("product_company", "ThinkPad laptop", {"Lenovo", "IBM"}),
        ("country_currency", "Iran", {"rial", "toman"}),
        ("english_spanish", "to drink", {"beber", "tomar"}),
        ("english_spanish", "to walk", {"caminar", "andar"}),
        ("english_german", "car", {"Auto", "Wagen"}),
        ("french_english", "aimer", {"to love", "to like"}),
        ("french_english", "parler", {"to speak", "to talk"}),
    ],
)
def test_what_else_is_right(name: str, text: str, also: set[str]) -> None:
    assert also <= set(dict(task(name))[text])


def test_cars_of_chevrolet_are_also_of_general_motors() -> None:
    found = [set(outs) for _, outs in task("product_company") if "Chevrolet" in outs]
    assert found == [{"Chevrolet", "General Motors", "GM", "Chevy"}] * 3


def test_kinship_is_no_antonymy() -> None:
    kin = {"father", "mother", "son", "uncle", "brother", "husband", "king"}
    assert not kin & set(dict(task("antonym")))


def test_countries_agree_between_tasks() -> None:
    landmarks = {outs[0] for _, outs in task("landmark_country")}
    known = {
        i
        for name in ("country_capital", "country_continent", "country_currency")
        for i, _ in task(name)
    }
    assert landmarks <= known


def test_classes_and_continents_are_from_the_closed_sets() -> None:
    classes = {outs[0] for _, outs in task("animal_class")}
    assert classes == {"mammal", "bird", "fish", "reptile", "amphibian", "insect"}
    continents = {outs[0] for _, outs in task("country_continent")}
    assert continents == {"Africa", "Asia", "Europe", "North America", "South America"}
    assert all(re.fullmatch(r"[A-Z][a-z]?", outs[0]) for _, outs in task("element_symbol"))


def test_french_both_ways_agree() -> None:
    into = dict(task("english_french"))
    for french, english in task("french_english"):
        key = next((e for e in english if e in into or "to " + e in into), None)
        if key is not None:
            assert french in into.get(key, []) + into.get("to " + key, []), french


# A/B sets


@pytest.mark.parametrize("name", ["agree_vs_accurate", "refuse_vs_comply"])
def test_ab_set(name: str) -> None:
    items = json.loads((DATA / "ab" / f"{name}.json").read_text(encoding="utf-8"))
    assert len(items) >= 70
    letters, longer_is_a, match_longer, gap = [], [], [], Counter[str]()
    questions, answers = [], []
    for item in items:
        assert set(item) == {
            "question",
            "answer_matching_behavior",
            "answer_not_matching_behavior",
        }
        found = re.fullmatch(r"(.+)\n\nChoices:\n \(A\) (.+)\n \(B\) (.+)", item["question"])
        assert found, item["question"]
        question, a, b = found.groups()
        assert clean(question) and clean(a) and clean(b)
        match = item["answer_matching_behavior"]
        assert {match, item["answer_not_matching_behavior"]} == {"(A)", "(B)"}
        letters.append(match)
        questions.append(question)
        answers += [a, b]
        mine, other = (a, b) if match == "(A)" else (b, a)
        gap[match] += len(mine) - len(other)
        if len(a) != len(b):
            longer_is_a.append(len(a) > len(b))
            match_longer.append((match == "(A)") == (len(a) > len(b)))
    n = len(items)
    assert len(set(questions)) == n and len(set(answers)) == 2 * n
    assert Counter(letters) == {"(A)": n // 2, "(B)": n // 2}
    # length tells nothing of the letter, and little of the behavior
    assert abs(sum(longer_is_a) / len(longer_is_a) - 0.5) < 0.05
    assert abs(gap["(A)"] - gap["(B)"]) / (n // 2) < 2
    assert 0.3 < sum(match_longer) / len(match_longer) < 0.7
    # no long run of one letter
    assert not re.search(r"A{6}|B{6}", "".join(x[1] for x in letters))
    # not filled into a template: openings and closings vary
    for cut in (slice(0, 3), slice(-3, None)):
        common = Counter(" ".join(q.split()[cut]).lower() for q in questions).most_common(1)
        assert common[0][1] <= 6, common


# contrast sets


@pytest.mark.parametrize(("name", "least"), [("sentiment", 60), ("french", 60), ("weddings", 40)])
def test_contrast_pairs(name: str, least: int) -> None:
    pairs = rows(CONTRAST / f"{name}.jsonl")
    assert len(pairs) >= least
    for row in pairs:
        assert set(row) == {"positive", "negative"}
        for text in row.values():
            assert clean(text) and text[-1] in ".?!", text
    texts = [text for row in pairs for text in row.values()]
    assert len(set(texts)) == len(texts)


WEDDING = re.compile(
    r"wedding|bride|groom|bouquet|newlywed|honeymoon|marri|marry|veil|aisle|altar|vows|propose"
    r"|engage[dm]|husband|wife|elope|bridesmaid|best man|each other|chapel|couple|rings",
    re.IGNORECASE,
)


def test_wedding_texts() -> None:
    on, off = lines("weddings_on.txt"), lines("weddings_off.txt")
    assert len(on) == len(off) == 40
    assert len(set(on) | set(off)) == 80 and all(clean(text) for text in on + off)
    pairs = rows(CONTRAST / "weddings.jsonl")
    assert not {row["positive"] for row in pairs} & set(on)
    assert not {row["negative"] for row in pairs} & set(off)
    strict = re.compile(r"wedding|bride|groom\b|newlywed|honeymoon|marri|marry|vows", re.I)
    for text in [*off, *(row["negative"] for row in pairs), *lines("neutral.txt")]:
        assert not strict.search(text), text
    share = sum(bool(WEDDING.search(text)) for text in on) / len(on)
    assert share > 0.8
    assert sum(bool(WEDDING.search(row["positive"])) for row in pairs) / len(pairs) > 0.8


def test_neutral_text() -> None:
    paragraphs = [text for text in lines("neutral.txt") if text]
    assert all(clean(text) for text in paragraphs)
    assert 1300 <= sum(len(text.split()) for text in paragraphs) <= 1800
    assert all(text.isascii() for text in paragraphs)


def french_share(texts: list[str], words: set[str]) -> float:
    found = re.findall(r"[^\W\d_]+", " ".join(texts).lower())
    return sum(word in words for word in found) / len(found)


def test_french_words_tell_french_from_english() -> None:
    listed = lines("french_words.txt")
    assert len(listed) >= 400 and listed == sorted(set(listed))
    assert all(re.fullmatch(r"[^\W\d_]+", word) and word == word.lower() for word in listed)
    words = set(listed)
    pairs = rows(CONTRAST / "french.jsonl")
    assert french_share([row["positive"] for row in pairs], words) > 0.6
    assert french_share([row["negative"] for row in pairs], words) == 0
    english = [*lines("neutral.txt"), *lines("weddings_on.txt"), *lines("weddings_off.txt")]
    english += [text for row in rows(CONTRAST / "sentiment.jsonl") for text in row.values()]
    assert french_share(english, words) < 0.001
