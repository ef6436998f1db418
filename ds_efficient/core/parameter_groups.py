"""Parameters of techniques get optimizer groups of their own.

A technique marks a parameter by an attribute ``parameter_group``: options of its group, with a ``"name"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def split_groups(groups: Iterable[Any]) -> list[Any]:
    """Move marked parameters into groups of their own.

    Args:
        groups: parameters, or parameter groups as dicts.

    Returns:
        The same parameters or groups where nothing is marked; else groups: each given one without its
        marked parameters (left out when nothing remains), followed by one for each name, with the options of
        the group that they come from and the marked options over them.
    """
    listed = as_lists(groups)
    if not any(getattr(parameter, "parameter_group", None) for parameter in _members(listed)):
        return listed
    if not isinstance(listed[0], Mapping):
        listed = [{"params": listed}]
    result: list[dict[str, Any]] = []
    for group in listed:
        options = {key: value for key, value in group.items() if key != "params"}
        plain: list[Any] = []
        marked: dict[str, dict[str, Any]] = {}
        for parameter in _members([group]):
            mark = getattr(parameter, "parameter_group", None)
            if mark is None:
                plain.append(parameter)
            else:
                marked.setdefault(mark["name"], {**options, **mark, "params": []})["params"].append(parameter)
        if plain:
            result.append({**options, "params": plain})
        result.extend(marked.values())
    return result


def as_lists(groups: Iterable[Any]) -> list[Any]:
    """Return parameters or parameter groups as given, iterators (that are used up by reading) as lists."""
    return [
        {**group, "params": _members([group])} if isinstance(group, Mapping) else group for group in groups
    ]


def _members(groups: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in groups:
        members = item["params"] if isinstance(item, Mapping) else item
        found.extend([members] if torch.is_tensor(members) else members)
    return found
