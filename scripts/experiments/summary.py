"""Prints the tables of experiment documents: task vectors, function vectors."""

import json
import sys
from pathlib import Path
from typing import Any


def cell(a: dict[str, Any] | None) -> str:
    return "-" if a is None else f"{a['value']:.2f}"


def table(rows: list[dict[str, Any]], first: str, columns: list[str]) -> None:
    width = max(len(r[first]) for r in rows)
    print(" ".join([first.ljust(width), *columns]))
    for r in rows:
        cells = [cell(r[c]).rjust(len(c)) for c in columns]
        print(" ".join([r[first].ljust(width), *cells]))


def main() -> None:
    for name in sys.argv[1:]:
        rows = json.loads(Path(name).read_text(encoding="utf-8"))["rows"]
        if "wrong" in rows[0]:
            columns = ["icl", "zero_shot", "zero_shot_vector", "vector_given_icl", "wrong"]
            table(rows, "task", [*columns, "wrong_vector"])
            able = [r for r in rows if r["icl"]["value"] > 0.5]
            better = [r for r in able if r["zero_shot_vector"]["low"] > r["zero_shot"]["high"]]
            more = [r for r in able if r["zero_shot_vector"]["value"] > r["zero_shot"]["value"]]
            print(
                f"in-context above 0.5: {len(able)} tasks; the vector beats zero-shot on {len(more)}, "
                f"on {len(better)} with intervals apart"
            )
        else:
            table(rows, "task", ["zero_shot", "icl", "vector", "vector_given_icl"])
            able = [r for r in rows if r["icl"]["correct"]]
            vector, icl = ([r[k]["value"] for r in able] for k in ("vector", "icl"))
            ratios = [v / i for v, i in zip(vector, icl, strict=True)]
            print(
                f"vector / in-context over {len(able)} tasks: mean of the ratios "
                f"{sum(ratios) / len(ratios):.2f}, ratio of the means {sum(vector) / sum(icl):.2f}"
            )


if __name__ == "__main__":
    main()
