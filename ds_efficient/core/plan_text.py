"""The plan as text: header, modules with what happens to them, memory, FLOPs, communication, warnings."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

from ds_efficient.core.apply import summary
from ds_efficient.core.technique import Action

if TYPE_CHECKING:
    from ds_efficient.core.memory import MemoryEstimate
    from ds_efficient.core.plan import Plan

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNT_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_bytes(value: float) -> str:
    """Return bytes with three digits and a binary unit (``"1.23 GiB"``)."""
    for size, unit in _BYTE_UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def show_count(value: float) -> str:
    """Return a number with three digits and a decimal prefix (``"354 M"``)."""
    for size, unit in _COUNT_UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"
    return f"{value:.3g}"


def align(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Return the rows (first: heads) as lines with columns of equal width.

    Args:
        rows: cells, equally many a row.
        right: columns whose cells stand at the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def fold(rows: Iterable[tuple[str, int | None, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Fold rows (name, layer, cells) of layers that have equal cells.

    ``decoder.layers.0.mlp``, ``decoder.layers.1.mlp`` become ``decoder.layers.0-1.mlp``. The number shown is
    the one in the name.
    """
    order: list[tuple[str, tuple[str, ...]]] = []
    numbers: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for name, layer, cells in rows:
        found = _LAYER.search(name) if layer is not None else None
        pattern = name if found is None else f"{name[: found.start()]}*{name[found.end() :]}"
        key = (pattern, cells)
        if key not in numbers:
            numbers[key] = []
            order.append(key)
        if found is not None:
            numbers[key].append(int(found.group()))
    return [(key[0].replace("*", ranges(numbers[key]), 1), key[1]) for key in order]


def ranges(numbers: Sequence[int]) -> str:
    """Return ``"0-3,5"`` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _header(plan: Plan) -> list[str]:
    layout, model = plan.layout, plan.inventory.model
    total = plan.inventory.total_parameters
    lines = [f"{plan.source}: {show_count(total)} parameters ({total:,})"]
    if plan.parameters_after != total:
        lines[0] += f", {show_count(plan.parameters_after)} after the techniques"
    if model is not None:
        lines.append(f"model: {model}")
    parts = [f"tensor {layout.tensor}", f"pipeline {layout.pipeline}", f"data {layout.data}"]
    if layout.sequence_parallel:
        parts.append("sequence parallel")
    lines.append(
        f"layout: {layout.world_size} rank{'' if layout.world_size == 1 else 's'} ({', '.join(parts)}), "
        f"{layout.precision}, ZeRO {layout.zero_stage}, optimizer {layout.optimizer}"
    )
    batch = (
        f"batch: {layout.global_batch} samples = micro-batch {layout.micro_batch_size} x {layout.data} "
        f"data-parallel ranks x {layout.num_microbatches} passes"
    )
    if plan.tokens_per_step is not None:
        batch += f"; {plan.tokens_per_step:,} tokens a step"
    lines.append(batch)
    again = layout.recompute
    if again.granularity == "selective":
        lines.append(f"recomputation: selective ({', '.join(again.modules)})")
    elif again.granularity is not None:
        count = "all" if again.num_layers is None else str(again.num_layers)
        lines.append(f"recomputation: full, {again.method or 'uniform'}, layers {count}")
    return lines


def _action_cell(action: Action | None) -> str:
    if action is None:
        return "-"
    return f"skip: {action.reason}" if action.skipped else action.action


def _modules(plan: Plan) -> list[str]:
    by_module = {
        name: {action.module: action for action in actions} for name, actions in plan.actions.items()
    }
    rows = []
    for module in plan.inventory:
        size = f"{module.in_features} -> {module.out_features}" if module.kind != "norm" else ""
        tied = f" (weight of {module.tied_to})" if module.tied_to else ""
        cells = (
            module.kind + tied,
            size,
            f"{module.parameters:,}",
            *(_action_cell(by_module[name].get(module.name)) for name in by_module),
        )
        rows.append((module.name, module.layer, cells))
    known = {module.name for module in plan.inventory}
    for actions in by_module.values():  # techniques may act on whole layers
        for action in actions.values():
            if action.module not in known:
                known.add(action.module)
                cells = (
                    "",
                    "",
                    "",
                    *(_action_cell(by_module[other].get(action.module)) for other in by_module),
                )
                found = re.search(r"\.(\d+)$", action.module)
                layer = int(found.group(1)) if found else None
                rows.append((f"{action.module}." if found else action.module, layer, cells))
    table = [("module", "kind", "in -> out", "parameters", *by_module)]
    table += [(name.rstrip("."), *cells) for name, cells in fold(rows)]
    lines = align(table, (2, 3))
    lines += [summary(name, actions) for name, actions in plan.actions.items()]
    lines += [f"{name}: {found.summary}" for name, found in plan.outlooks.items()]
    if not plan.actions:
        lines.append("no technique is enabled")
    return lines


_MEMORY_ROWS = (
    ("parameters", "parameters"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer states, fp32 copy"),
    ("buffers", "buffers of techniques"),
    ("activations", "activations"),
    ("logits", "logits and loss"),
    ("workspace", "backward workspace"),
    ("communication", "communication buckets"),
    ("step", "optimizer step"),
    ("host", "host memory (offload)"),
)


def _memory(plan: Plan) -> list[str]:
    def mark(found: MemoryEstimate) -> str:
        return f"ZeRO {found.zero_stage}" + (" *" if found.zero_stage == plan.layout.zero_stage else "")

    table = [("bytes a rank", *(mark(found) for found in plan.memory))]
    for name, title in _MEMORY_ROWS:
        values = [getattr(found, name) for found in plan.memory]
        if any(values):
            table.append((title, *(show_bytes(value) if value else "-" for value in values)))
    table.append(("peak of a step", *(show_bytes(found.peak) for found in plan.memory)))
    if plan.layout.pipeline > 1:
        table.append(("fullest pipeline stage", *(str(found.pipeline_stage) for found in plan.memory)))
    table.append(("runs", *("no" if problems else "yes" for problems in plan.stage_problems)))
    lines = align(table, range(1, 5))
    lines.append("* of this configuration. Not counted: CUDA context, allocator gaps, libraries' buffers.")
    for stage, problems in enumerate(plan.stage_problems):
        lines += [f"ZeRO {stage} does not run: {problem}" for problem in problems]
    return lines


def _costs(plan: Plan) -> list[str]:
    model, executed = plan.model_flops.to_json(), plan.executed_flops.to_json()
    table = [("FLOPs a token (forward + backward)", "model", "executed")]
    table += [
        (name, show_count(model[name]), show_count(executed[name]))
        for name in model
        if model[name] or executed[name]
    ]
    lines = align(table, (1, 2))
    if plan.tokens_per_step is not None:
        lines.append(f"model FLOPs a step: {show_count(model['total'] * plan.tokens_per_step)}FLOP")
    sent = plan.communication.to_json()
    rows = [("bytes sent a rank and step", "")]
    rows += [(name, show_bytes(value)) for name, value in sent.items() if value or name == "total"]
    return [*lines, "", *align(rows, (1,))]


def plan_text(plan: Plan) -> str:
    """Return the whole plan as text, with a newline at its end."""
    blocks = [_header(plan), _modules(plan), _memory(plan), _costs(plan)]
    if plan.warnings:
        blocks.append([f"warning: {line}" for line in plan.warnings])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"
