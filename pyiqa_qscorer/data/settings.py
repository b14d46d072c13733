"""Settings in YAML files: read, changed by dotted keys, and checked by a pydantic model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

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
        names = ", ".join(sorted(example.name for example in examples.glob("*.yaml")))
        known = f"; examples: {names}" if path.parent == Path() else ""
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


def check_settings(model: type[Model], content: Mapping[str, Any], source: str) -> Model:
    """The settings as `model`.

    Raises:
        TrainingConfigError: An unknown key (with the nearest known one), or a value outside its rule; the message
            names the place of each.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"] if not str(part).startswith(KIND)) or "top level"
            lines.append(f"  {place}: {_reason(model, item)}")
        raise TrainingConfigError(f"{source} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


def kind_tag(model: type[BaseModel]) -> str:
    """Tag of one of the models of a discriminated union, which pydantic puts into the place of an error."""
    return f"{KIND}{model.__name__}"


def _reason(model: type[BaseModel], item: Any) -> str:
    if item["type"] != "extra_forbidden":
        shown = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
        return f"{item['msg'].removeprefix('Value error, ')}{shown}"
    *section, key = (part for part in item["loc"] if isinstance(part, str))
    models = [model]
    for part in section:
        tagged = [one for one in models if kind_tag(one) == part]
        hints = [one.model_fields[part].annotation for one in models if part in one.model_fields]
        models = tagged or [found for hint in hints for found in models_in(hint)] or models
    known = list(dict.fromkeys(name for one in models for name in one.model_fields))
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key; {hint}"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


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
