"""Prints the tables of experiment documents: task vectors, function vectors, compositions."""

import json
import sys
from pathlib import Path
from typing import Any


def cell(a: dict[str, Any] | None) -> str:
    return "-" if a is None else f"{a['accuracy']:.2f}"


def table(rows: list[dict[str, Any]], first: str, columns: list[str]) -> None:
    width = max(len(r[first]) for r in rows)
    print(" ".join([first.ljust(width), *columns]))
    for r in rows:
        cells = [cell(r[c]).rjust(len(c)) for c in columns]
        print(" ".join([r[first].ljust(width), *cells]))


def main() -> None:
    for name in sys.argv[1:]:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        rows = json.loads(text)["rows"]
        if "composition" in rows[0]:
            table(rows, "composition", ["icl", "zero_shot", "direct", "composed"])
            for r in rows:
                print(f"{r['composition']}: cosine {r['cosine']:.2f}, layers {r['layers']}")
        elif "wrong" in rows[0]:
            table(rows, "task", ["icl", "zero_shot", "zero_shot_vector", "wrong", "wrong_vector"])
            able = [r for r in rows if r["icl"]["accuracy"] > 0.5]
            better = [r for r in able if r["zero_shot_vector"]["low"] > r["zero_shot"]["high"]]
            more = [
                r for r in able if r["zero_shot_vector"]["accuracy"] > r["zero_shot"]["accuracy"]
            ]
            print(
                f"in-context above 0.5: {len(able)} tasks; the vector beats zero-shot on {len(more)}, "
                f"on {len(better)} with intervals apart"
            )
        else:
            table(rows, "task", ["zero_shot", "icl", "vector", "vector_given_icl"])
            shares = [
                r["vector"]["accuracy"] / r["icl"]["accuracy"] for r in rows if r["icl"]["correct"]
            ]
            print(
                f"mean of vector / in-context over {len(shares)} tasks: {sum(shares) / len(shares):.2f}"
            )


if __name__ == "__main__":
    main()
