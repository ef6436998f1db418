"""JSON schema of the whole DeepSpeed file, for editors and for checking without this package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ds_efficient.config import deepspeed_facts as facts
from ds_efficient.config import deepspeed_keys
from ds_efficient.config.base import Section
from ds_efficient.config.efficiency import GENERAL, SCHEMA, GeneralConfig
from ds_efficient.registry import TECHNIQUES, TechniqueRow, resolve

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def build_schema(rows: Sequence[TechniqueRow] = TECHNIQUES) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a DeepSpeed configuration.

    This package's sections are typed in full and refuse unknown keys, as do those of DeepSpeed's sections
    that refuse them themselves; other top-level keys are allowed, since other tools put theirs there.
    """
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {
        SCHEMA: {"type": "string", "description": "Where this schema lies, for editors."},
        GENERAL: _section_schema(GeneralConfig, definitions),
    }
    for key, entry in facts.TOP_LEVEL.items():
        properties[key] = {**entry.schema, "description": entry.text}
    for path in sorted(deepspeed_keys.CLOSED, key=lambda path: path.count(".")):
        _closed(_object_at(properties, path.split(".")), path)
    for row in rows:
        outer = _object_at(properties, row.path[:-1]) if len(row.path) > 1 else {"properties": properties}
        outer.setdefault("properties", {})[row.path[-1]] = _section_schema(resolve(row.config), definitions)
    for path, keys in facts.PARENT_KEYS.items():
        parent = _object_at(properties, path.split("."))
        known = {key: {"type": "boolean"} if key == "enabled" else {} for key in keys}
        parent["properties"] = {**known, **parent.get("properties", {})}
        parent["additionalProperties"] = False
    return {
        "$schema": DIALECT,
        "title": "DeepSpeed configuration with the sections of ds_efficient",
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": True,
        "$defs": dict(sorted(definitions.items())),
    }


def render_schema(rows: Sequence[TechniqueRow] = TECHNIQUES) -> str:
    """Return the schema as the text of the file that is shipped."""
    return json.dumps(build_schema(rows), indent=2, ensure_ascii=False) + "\n"


def _section_schema(model: type[Section], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = model.model_json_schema()
    for name, definition in schema.pop("$defs", {}).items():
        if definitions.setdefault(name, definition) != definition:
            raise ValueError(f"two different configuration classes are called {name}")
    return schema


def _object_at(properties: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the schema of the object at `path`, made where there is none yet."""
    schema: dict[str, Any] = {"properties": properties}
    for key in path:
        schema = schema.setdefault("properties", {}).setdefault(key, {"type": "object"})
    return schema


def _closed(schema: dict[str, Any], path: str) -> None:
    """Give the schema of a section that refuses unknown keys those that DeepSpeed knows."""
    known = schema.setdefault("properties", {})
    for key, kind in deepspeed_keys.CLOSED[path].items():
        dotted = f"{path}.{key}"
        known.setdefault(key, _loose(kind))
        if dotted in facts.CHOICES:
            known[key] = {"enum": list(facts.CHOICES[dotted])}
    schema["additionalProperties"] = False


def _loose(kind: str) -> dict[str, Any]:
    plain = kind.rstrip("?")
    if plain in ("any", "array"):  # for some lists DeepSpeed takes a single name too
        return {}
    return {"type": [plain, "null"]} if kind.endswith("?") else {"type": plain}
