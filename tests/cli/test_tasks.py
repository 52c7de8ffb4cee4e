"""tasks as a person types it."""

from pathlib import Path

from commands import document, refused, run, shown_help

from mia.datasets import tasks


def test_lists_shows_and_prompts(folder: Path) -> None:
    listed = document("tasks")
    assert [e["name"] for e in listed["tasks"]] == [e["name"] for e in tasks.index()]
    assert listed["compositions"][0].keys() == {"name", "AC", "BC", "BD", "AD"}
    plain = run("tasks").stdout.splitlines()
    n = len(listed["tasks"])
    assert plain[0].startswith("country_capital ") and plain[n] == ""
    assert [line.split()[0] for line in plain[:n]] == [e["name"] for e in listed["tasks"]]
    first = listed["compositions"][0]
    assert len(plain) == n + 2 + len(listed["compositions"])
    assert plain[n + 2].split(maxsplit=1) == [
        first["name"],
        ", ".join(f"{k} {first[k]}" for k in ("AC", "BC", "BD", "AD")),
    ]

    file = folder / "mine.json"
    file.write_text('{"a": ["b", "c"], "d": "e", "f": "g"}')
    assert run("tasks", str(file)).stdout == "a\tb | c\nd\te\nf\tg\n"
    pairs = document("tasks", str(file))
    assert pairs["pairs"][0] == {"input": "a", "output": ["b", "c"]}

    words = ("tasks", str(file), "--show-prompt", "--shots")
    prompt = document(*words, "2", "--format", "{input}>{output}\\n")
    lines = prompt["prompt"].split("\n")
    assert len(lines) == 3 and lines[2].endswith(">")
    assert prompt["answers"] in (["b", "c"], ["e"], ["g"])
    assert refused("tasks", "nope").startswith("unknown task 'nope'")
    assert "need 3 examples, only 2 available" in refused(*words, "3")
    for option in (("--shots", "3"), ("--format", "qa"), ("--seed", "1")):
        for name in ((), (str(file),)):
            assert refused("tasks", *name, *option) == f"{option[0]} needs --show-prompt"
    nameless = refused("tasks", "--show-prompt")
    assert (
        nameless == "--show-prompt needs a task: mia tasks NAME --show-prompt (a name, or a file)"
    )
    assert r"\n and \t are read" in shown_help("tasks")
    text = run(*words, "2", "--format", "{input}>{output}\\n").stdout
    assert text == prompt["prompt"] + "\n" and prompt["seed"] == 0
