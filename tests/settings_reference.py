"""The README beside the example trainings, made from the models that check them."""

import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pyiqa_qscorer.data.settings import models_in


def settings_reference(model: type[BaseModel]) -> str:
    """Markdown of every setting of a model and its sections: name, type, default and meaning."""
    parts, pending, seen = [], [("Top level", model)], {model}
    while pending:
        place, section = pending.pop(0)
        rows = [f"## {place}", "", " ".join((section.__doc__ or "").split()), ""]
        rows += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in section.model_fields.items():
            inner = [one for one in dict.fromkeys(models_in(field.annotation))]
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
