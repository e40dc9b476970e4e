"""Documents from files: strict pydantic models, and errors that name the place in one line."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from topology.constraints import nearest
from topology.errors import TopologyError

D = TypeVar("D", bound="Document")

#: Characters of a wrong value that an error repeats.
_SHOWN = 60


class FormatError(TopologyError):
    """A document is not what its format says. `place` is a path into it, as in `sites[1].devices[0].memory_bytes`."""

    def __init__(self, place: str, problem: str) -> None:
        self.place, self.problem = place, problem
        super().__init__(f"{place}: {problem}" if place else problem)

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, str]]:
        """Pickles with its parts."""
        return type(self), (self.place, self.problem)


class Document(BaseModel):
    """The base of all parts of a format: nothing is converted, nothing unknown passes, no number is NaN or infinite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=False)


def _whole(value: Any) -> Any:
    """A whole number written as 8e10 is one: JSON has a single kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
#: Part of a key `site/device`, hence without a slash; and it is printed, hence without control characters.
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f/]+$")]


def check(kind: type[D], document: Any) -> D:
    """The document as `kind`. Raises FormatError for the first thing that is wrong, with how many more there are."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # A misspelt key is an unknown one and a missing one: the former says more.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = path(first["loc"])
    more = len(problems) - 1
    suffix = f" (and {more} more)" if more else ""
    raise FormatError(place, _problem(kind, document, first) + suffix)


def path(loc: tuple[int | str, ...]) -> str:
    """A place in a document: ("sites", 1, "name") is "sites[1].name"."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _problem(kind: type[BaseModel], document: Any, error: Any) -> str:
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return f"unknown key: {nearest(str(error['loc'][-1]), _keys(kind, error['loc'][:-1]), 'known')}"
        case "model_type":
            return f"must be an object, not {shown(error['input'])}"
        case "finite_number":
            return f"must be a finite number, not {shown(error['input'])}"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            return f"must not contain slashes or control characters, as {shown(error['input'])} does"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{message}, not {shown(error['input'])}"


def shown(value: Any) -> str:
    """A wrong value, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _keys(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys known at a place, found by following the annotations."""
    here: Any = kind
    for part in loc:
        if isinstance(part, str) and isinstance(here, type) and issubclass(here, BaseModel):
            names = {field.alias or name: field.annotation for name, field in here.model_fields.items()}
            here = names.get(part)
        else:
            here = next(iter(getattr(here, "__args__", ())), None)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return [field.alias or name for name, field in here.model_fields.items()]
    return []
