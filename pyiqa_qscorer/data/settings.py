"""Settings in YAML files: read, changed by dotted keys, checked by a pydantic model, and described in Markdown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from ..errors import TrainingConfigError

Model = TypeVar("Model", bound=BaseModel)
KIND = "kind:"


class Section(BaseModel):
    """A section of a YAML file: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path, examples: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Content of a YAML file.

    Args:
        path: The file; a bare name without folder is also looked up among the examples.
        examples: Folder of the package's examples.
        overrides: Dotted keys and values that go over the file, e.g. `{"training.seed": 1}`.

    Raises:
        TrainingConfigError: No such file, no mapping in it, or an override of something that is no section.
    """
    file = path if path.exists() or path.parent != Path() else examples / path
    if not file.exists():
        known = f"; examples: {', '.join(example_names(examples))}" if path.parent == Path() else ""
        raise TrainingConfigError(f"configuration {path} cannot be read: there is no such file{known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingConfigError(f"configuration {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainingConfigError(f"configuration {path} must be a mapping of sections, got {type(content).__name__}")
    for dotted, value in (overrides or {}).items():
        _set(content, dotted.split("."), value)
    return content


def example_names(folder: Path) -> list[str]:
    """Names of the YAML files in a folder of examples."""
    return sorted(path.name for path in folder.glob("*.yaml"))


def check_settings(model: type[Model], content: Mapping[str, Any], source: str) -> Model:
    """The settings as `model`.

    Raises:
        TrainingConfigError: An unknown key (with the nearest known one), or a value outside its rule; the message
            names the place of each.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_place(item['loc'])}: {_reason(model, item)}" for item in error.errors()]
        raise TrainingConfigError(f"{source} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


def kind_tag(model: type[BaseModel]) -> str:
    """Tag of one of the models of a discriminated union, which pydantic puts into the place of an error."""
    return f"{KIND}{model.__name__}"


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not str(part).startswith(KIND)) or "top level"


def _reason(model: type[BaseModel], item: Any) -> str:
    if item["type"] != "extra_forbidden":
        shown = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
        return f"{item['msg'].removeprefix('Value error, ')}{shown}"
    *section, key = (part for part in item["loc"] if isinstance(part, str))
    models = [model]
    for part in section:
        tagged = [one for one in models if kind_tag(one) == part]
        models = tagged or [found for one in models for found in _models_in(_field(one, part))] or models
    known = list(dict.fromkeys(name for one in models for name in one.model_fields))
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key; {hint}"


def _field(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].annotation if name in model.model_fields else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    """Put a value at a path of keys; a number is the position in a list, from 0."""
    *parents, last = keys
    inner: Any = content
    for key in parents:
        inner = _entry(inner, key, keys)
    if isinstance(inner, list):
        _entry(inner, last, keys)
        inner[int(last)] = value
    else:
        inner[last] = value


def _entry(section: Any, key: str, keys: list[str]) -> Any:
    if isinstance(section, list):
        if not key.isdecimal() or int(key) >= len(section):
            raise TrainingConfigError(f"override {'.'.join(keys)}: {key} is not one of 0..{len(section) - 1}")
        return section[int(key)]
    found = section.setdefault(key, {})
    if not isinstance(found, (dict, list)):
        raise TrainingConfigError(f"override {'.'.join(keys)}: {key} is not a section")
    return found


# --- reference ------------------------------------------------------------------------------------------------------


def settings_reference(model: type[BaseModel]) -> str:
    """Markdown of every setting of a model and its sections: name, type, default and meaning."""
    parts, pending, seen = [], [("Top level", model)], {model}
    while pending:
        place, section = pending.pop(0)
        rows = [f"## {place}", "", " ".join((section.__doc__ or "").split()), ""]
        rows += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in section.model_fields.items():
            inner = [one for one in dict.fromkeys(_models_in(field.annotation))]
            pending += [
                (f"{name}: {one.__name__}" if len(inner) > 1 else name, one) for one in inner if one not in seen
            ]
            seen.update(inner)
            kind = "section" if inner else _type_name(field)
            rows.append(f"| `{name}` | {kind} | {_default(field)} | {field.description or ''} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or isinstance(value, BaseModel):
        return "required" if field.is_required() else ""
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type_name(field: FieldInfo) -> str:
    """The annotation as Python writes it, without modules, and the limits of a number."""
    annotation: Any = field.annotation
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    text = re.sub(r"\b(typing|pathlib|_local)\.", "", text).replace(" | ", " or ")
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{sign} {getattr(one, name)}" for one in field.metadata for name, sign in signs.items() if hasattr(one, name)
    ]
    return ", ".join([text, *limits])
