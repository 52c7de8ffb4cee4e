"""Report: what every experiment returns. It prints as text, shows as a table, becomes JSON.

print(report)              # plain text, as a command prints into a pipe
report                     # in a notebook: the table, coloured
report.document()          # the JSON document
report.rows()              # a list of plain dicts; report.to_pandas() where pandas is installed
report.save("out.json")
report.plot("out.png")     # reports that have a picture
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import UsageError
from mia.show.text import safe

if TYPE_CHECKING:
    from rich.console import RenderableType


class Report:
    """The result of an experiment. A subclass writes `document` and `plain`, and `table`, `rows`
    and `plot` where there is more to show."""

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

    def save(self, path: str | Path) -> None:
        """Writes the document. Raises `FileError`."""
        from mia.io.files import write_json

        write_json(path, self.document())

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

        console = SafeConsole(record=True, file=io.StringIO(), width=110, color_system="truecolor")
        console.print(self.table(110))
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.25">{code}</pre>'
        )
