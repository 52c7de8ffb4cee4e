"""Report: what every experiment returns. It prints as text, shows as a table, becomes JSON.

print(report)              # plain text, as a command prints into a pipe
report                     # in a notebook: the table, coloured
report.document()          # the JSON document
report.rows()              # a list of plain dicts; report.to_pandas() where pandas is installed
report.save("out.json")    # or .csv (the rows), .html (a page), .png (a picture)
report.plot("out.png")     # reports that have a picture
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mia.errors import FileError, UsageError
from mia.show.text import safe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.show.again import Again

#: of pictures (`mia.show.plots`)
PICTURES = (".png", ".svg", ".pdf")


def endings(*, picture: bool, own: Sequence[str] = ()) -> tuple[str, ...]:
    """How the names of a report's files may end."""
    return (".json", ".csv", ".html", *(PICTURES if picture else ()), *own)


def check_ending(path: str | Path, known: Sequence[str]) -> str:
    """The ending of a file's name, in small letters. Raises `FileError` if it is not known."""
    ending = Path(path).suffix.lower()
    if ending not in known:
        none = "the result has no picture; " if ending in PICTURES else ""
        raise FileError(f"cannot write {path}: {none}its name must end in {', '.join(known)}")
    return ending


class Report:
    """The result of an experiment. A subclass writes `document` and `plain`, and `table`, `rows`
    and `plot` where there is more to show."""

    #: endings of files of its own kind, which its own `save` writes
    own_endings: ClassVar[tuple[str, ...]] = ()

    @property
    def failed(self) -> bool:
        """Whether it says that something is not as it should be."""
        return False

    def document(self) -> dict[str, Any]:
        """The whole result as JSON has it."""
        raise NotImplementedError

    def plain(self) -> str:
        """The result in plain lines."""
        raise NotImplementedError

    def table(self, width: int) -> RenderableType:
        """The result as a terminal of this many columns shows it."""
        from rich.text import Text

        return Text(safe(self.plain(), "\n\t"))

    def rows(self) -> list[dict[str, Any]]:
        """The result as a list of flat records."""
        raise UsageError(f"{type(self).__name__} has no rows")

    def plot(self, path: str | Path) -> None:
        """Draws the result: .png, .svg or .pdf. Raises `UsageError` or `FileError`."""
        raise UsageError(f"{type(self).__name__} has no picture")

    def page(self, run: Mapping[str, Any] | None = None, again: Again | None = None) -> str:
        """The result as one page of HTML.

        Args:
            run: what made it, as a document has it.
            again: the command line that made it.
        """
        from mia.show.views import result_page

        document = self.document()
        return result_page({**document, "run": run} if run else document, self._records(), again)

    def save(self, path: str | Path) -> None:
        """Writes the result by the ending of the file's name: .json the document, .csv the rows,
        .html a page, .png, .svg or .pdf the picture.

        Raises `FileError`, and `UsageError` where there is nothing to draw."""
        save_report(self, path)

    def _records(self) -> list[dict[str, Any]] | None:
        """`rows`, None where there are none."""
        return None if type(self).rows is Report.rows else self.rows()

    def to_pandas(self) -> Any:
        """`rows` as a `pandas.DataFrame`. Raises `UsageError` where pandas is not installed."""
        try:
            import pandas  # type: ignore[import-untyped,unused-ignore]
        except ImportError as err:
            raise UsageError("a DataFrame needs pandas: pip install pandas") from err
        return pandas.DataFrame(self.rows())

    def __str__(self) -> str:
        return self.plain()

    def _repr_html_(self) -> str:
        import io

        from mia.show.terminal import SafeConsole

        console = SafeConsole(
            record=True, file=io.StringIO(), width=110, color_system="truecolor", no_color=False
        )
        console.print(self.table(110))
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.25">{code}</pre>'
        )


def save_report(
    report: Report,
    path: str | Path,
    run: Mapping[str, Any] | None = None,
    again: Again | None = None,
) -> None:
    """`Report.save`; a document and a page also say what made them (see `Report.page`)."""
    from mia.io.files import write_json
    from mia.io.tables import write_csv
    from mia.show.html import write_page

    picture = type(report).plot is not Report.plot
    ending = check_ending(path, endings(picture=picture, own=report.own_endings))
    if ending in report.own_endings:
        report.save(path)
    elif ending == ".json":
        write_json(path, {**report.document(), **({"run": run} if run else {})})
    elif ending == ".csv":
        write_csv(path, report.rows())
    elif ending == ".html":
        write_page(path, report.page(run, again))
    else:
        report.plot(path)
