"""The table of combinations for the documentation, made by asking the rules of `parallelism`."""

from __future__ import annotations

from dataclasses import replace

from ds_efficient.core.layout import FUSED_ADAM, PRECISIONS, ParallelLayout
from ds_efficient.core.parallelism import RULES, Rule, broken_rules

_COMBINATIONS: tuple[tuple[str, ParallelLayout], ...] = (
    ("data parallel (DP)", ParallelLayout(world_size=4)),
    ("tensor parallel (TP)", ParallelLayout(world_size=2, tensor=2)),
    ("TP + sequence parallel (SP)", ParallelLayout(world_size=2, tensor=2, sequence_parallel=True)),
    ("TP x DP", ParallelLayout(world_size=4, tensor=2)),
    ("TP + SP x DP", ParallelLayout(world_size=4, tensor=2, sequence_parallel=True)),
    (
        "pipeline parallel (PP), tied embeddings",
        ParallelLayout(world_size=2, pipeline=2, tied_embeddings=True),
    ),
    ("PP, untied embeddings", ParallelLayout(world_size=2, pipeline=2, tied_embeddings=False)),
    ("PP x DP, tied", ParallelLayout(world_size=4, pipeline=2, tied_embeddings=True)),
    ("PP x DP, untied", ParallelLayout(world_size=4, pipeline=2, tied_embeddings=False)),
    ("PP x TP, tied", ParallelLayout(world_size=4, pipeline=2, tensor=2, tied_embeddings=True)),
    (
        "PP x TP + SP, tied",
        ParallelLayout(world_size=4, pipeline=2, tensor=2, sequence_parallel=True, tied_embeddings=True),
    ),
    (
        "PP x TP + SP, untied",
        ParallelLayout(world_size=4, pipeline=2, tensor=2, sequence_parallel=True, tied_embeddings=False),
    ),
)


def _summary(rule: Rule) -> str:
    return (rule.__doc__ or "").strip().splitlines()[0]


def _cell(layout: ParallelLayout, notes: list[Rule]) -> str:
    """Return ``runs``, ``FusedAdam [n]`` or ``refused [n]``; `notes` collects the numbered rules."""
    fused = broken_rules(replace(layout, optimizer=FUSED_ADAM))
    other = broken_rules(replace(layout, optimizer="torch_adam"))
    if not other:
        return "runs"
    for rule in other:
        if rule not in notes:
            notes.append(rule)
    numbers = ", ".join(str(notes.index(rule) + 1) for rule in (fused or other))
    return f"refused [{numbers}]" if fused else f"FusedAdam [{numbers}]"


def make_table() -> str:
    """Return the table of combinations as Markdown, made by asking the rules themselves."""
    notes: list[Rule] = []
    lines = []
    for precision in PRECISIONS:
        lines += [f"### {precision}", "", "| | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|"]
        for name, layout in _COMBINATIONS:
            cells = [
                _cell(replace(layout, zero_stage=stage, precision=precision), notes) for stage in range(4)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "`FusedAdam`: runs with DeepSpeed's FusedAdam (optimizer type AdamW without torch_adam) only.",
        "",
    ]
    lines += [f"{number}. {_summary(rule)}" for number, rule in enumerate(notes, 1)]
    lines += ["", "All rules, in the order in which they are checked:", ""]
    lines += [f"- {_summary(rule)}" for rule in RULES]
    return "\n".join(lines) + "\n"
