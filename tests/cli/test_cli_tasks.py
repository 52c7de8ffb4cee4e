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
    shown = document("tasks", str(file))
    assert shown["pairs"][0] == {"input": "a", "output": ["b", "c"]}

    words = ("tasks", str(file), "--prompt", "--shots")
    made = document(*words, "2", "--format", "{input}>{output}\\n")
    lines = made["prompt"].split("\n")
    assert len(lines) == 3 and lines[2].endswith(">")
    assert made["answers"] in (["b", "c"], ["e"], ["g"])
    assert refused("tasks", "nope").startswith("unknown task 'nope'")
    assert "3 examples are asked for; 2 are left" in refused(*words, "3")
    nameless = refused("tasks", "--prompt")
    assert nameless == "--prompt needs a task: mia tasks NAME --prompt (a name, or a file)"
    assert r"\n and \t are read" in shown_help("tasks")
