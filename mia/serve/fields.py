"""The fields of a JSON body: each is read once and checked; what is left over is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from mia.errors import UsageError
from mia.show.text import safe
from mia.values import shown


class Refused(UsageError):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP; param: the field that is wrong; code: OpenAI's name of the error.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def document(self) -> dict[str, Any]:
        return error_document(str(self), self.status, self.param, self.code)


def error_document(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 503: "server_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": safe(message), "type": kind, "param": param, "code": code}}


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def parse_json(data: bytes) -> Any:
    """Raises `Refused` for what is no JSON."""
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        raise Refused(f"the body is not JSON: {shown(str(err))}") from None


class Fields:
    """A JSON object being read. A field that is null is as if it were not there."""

    def __init__(self, body: Any, where: str = ""):
        """`where`: what messages call the object; the body itself by default."""
        if not isinstance(body, dict):
            raise Refused(f"{where or 'the body'} is a JSON object, not {shown(body)}", param=where)
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = f"{where}." if where else ""

    def name(self, name: str) -> str:
        return self._where + name

    def has(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def refuse(self, name: str, message: str) -> Refused:
        return Refused(f"{self.name(name)} {message}", param=self.name(name))

    def text(self, name: str, default: str | None = None, *, most: int = 1 << 20) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, f"is a text, not {shown(value)}")
        if value is not None and len(value) > most:
            raise self.refuse(name, f"has {len(value)} letters; {most} are the most")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, f"is true or false, not {shown(value)}")
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name, default)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(name, f"is a whole number, not {shown(value)}")
        if not low <= value <= high:
            raise self.refuse(name, f"is {low} to {high}, not {shown(value)}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.refuse(name, f"is a number, not {shown(value)}")
        if not low <= value <= high or not math.isfinite(value):
            raise self.refuse(name, f"is {low:g} to {high:g}, not {shown(value)}")
        return float(value)

    def ranges(self, name: str) -> str | list[int] | None:
        """Layers or tokens: "3,7", "10..20", a number, or a list of numbers."""
        value = self.take(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return [value]
        if value is None or (isinstance(value, str) and len(value) <= 1000):
            return value
        if isinstance(value, list) and len(value) <= 4096 and all(type(x) is int for x in value):
            return value
        raise self.refuse(name, f'is like "3,7", "10..20" or [3, 7], not {shown(value)}')

    def several(self, name: str, most: int) -> list[Any]:
        """A list; one thing by itself is a list of one."""
        value = self.take(name, [])
        values = value if isinstance(value, list) else [value]
        if len(values) > most:
            raise self.refuse(name, f"has {len(values)} entries; {most} are the most")
        return values

    def only(self, name: str, *allowed: Any) -> None:
        """A field that is known, but of which one value alone can be served."""
        value = self.take(name, allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise self.refuse(name, f"is not supported here: {shown(value)}")

    def end(self) -> None:
        """Raises `Refused` if there are more fields than were read."""
        if self._left:
            names = ", ".join(shown(self.name(n)) for n in sorted(self._left)[:5])
            raise Refused(f"unknown or unsupported: {names}", param=sorted(self._left)[0][:100])
