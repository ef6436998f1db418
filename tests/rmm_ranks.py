"""What the ranks of the tests of RMM run: a small network through the engine, tensor-parallel layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from engine_steps import digest, parameter_dtype, step_over
from seam_product import numbers
from seam_ranks import _input, _layer, _settings
from torch import Tensor

import ds_efficient
from ds_efficient.core.keys import Key
from ds_efficient.ops.rmm import partition, sketch_matrix
from ds_efficient.rmm.product import RandomizedProduct
from ds_efficient.rmm.sketch import Clock, Sketch

LR, MICRO_BATCHES, STEPS, ROWS, SEED = 1e-2, 2, 6, 96, 5
WIDTHS = {"fc1": (16, 32), "fc2": (32, 16), "head": (16, 4)}
RMM = {"enabled": True, "modules": ["fc1", "fc2"], "ratio": 0.25, "block_size": 32, "min_rows": 8}
SLOPE = {"enabled": True, "modules": ["fc1", "fc2"], "adapter": {"rank": 2, "start_step": 3}}


class Net(torch.nn.Module):
    """Three linear layers; the mean square distance to a target is the loss."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, (inputs, outputs) in WIDTHS.items():
                self.add_module(name, torch.nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        return (y - x[..., :4].sin()).float().square().mean()


def settings(stage: int, precision: str = "fp32", **sections: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration with RMM."""
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "ds_efficient": {"seed": SEED, "evidence_steps": 2},
        **precisions[precision],
        **sections,
        "rmm": {**RMM, **sections.get("rmm", {})},
    }


def build(stage: int, precision: str = "fp32", **sections: Any) -> Any:
    """Return an engine around a `Net`."""
    return ds_efficient.initialize(model=Net(), config=settings(stage, precision, **sections))[0]


def batch(number: int, micro: int, rank: int) -> Tensor:
    """Return one rank's data of a micro-batch."""
    return torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(100 * number + 10 * micro + rank))


def step(engine: Any, number: int) -> float:
    """Run one optimizer step; return the loss of all ranks."""
    dtype, rank = parameter_dtype(engine), dist.get_rank()
    return step_over(engine, (batch(number, micro, rank).to(dtype) for micro in range(MICRO_BATCHES)))


def train(stage: int, precision: str = "fp32", **sections: Any) -> dict[str, Any]:
    """Train `STEPS` steps; return losses, and what the technique says."""
    engine = build(stage, precision, **sections)
    losses, metrics = [], []
    for number in range(STEPS):
        losses.append(step(engine, number))
        metrics.append(dict(engine.ds_efficient.metrics["rmm"]))
    technique = engine.ds_efficient.techniques[-1]
    return {
        "losses": losses,
        "metrics": metrics,
        "counts": dict(engine.ds_efficient.evidence()["rmm"].counts),
        "ratios": {name: sketch.ratio for name, sketch in technique.sketches.items()},
        "names": list(engine.module.state_dict()),
    }


def train_all(cases: list[tuple[int, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Train one engine after the other."""
    return [train(stage, precision, **sections) for stage, precision, sections in cases]


def own_optimizer() -> list[float]:
    """Train with an optimizer that was made before: the parameters stay the same objects."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    config = settings(0)
    config.pop("optimizer")
    engine = ds_efficient.initialize(model=model, optimizer=optimizer, config=config)[0]
    return [step(engine, number) for number in range(STEPS)]


def idle() -> str:
    """Train with sketches that would keep every row; return the refusal."""
    engine = build(0, rmm={"min_rows": ROWS})
    try:
        for number in range(4):
            step(engine, number)
    except ds_efficient.InactiveTechnique as error:
        return f"{engine.global_steps}: {error}"
    return ""


def save_and_resume(folder: str, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Return an unbroken run, and those resumed from two of its checkpoints."""

    def finish(engine: Any, first: int) -> dict[str, Any]:
        losses = []
        for number in range(first, STEPS):
            losses.append(step(engine, number))
            if first == 0 and engine.global_steps in (1, 4):
                engine.save_checkpoint(folder)
        return {"losses": losses, "digest": digest(engine)}

    found: dict[str, Any] = {"unbroken": finish(build(stage, **sections), 0)}
    for first in (1, 4):
        engine = build(stage, **sections)
        step(engine, 77)  # what the engine did before must not matter
        engine.load_checkpoint(folder, tag=f"global_step{first}")
        found[str(first)] = finish(engine, first)
    return found


def switch(folder: str) -> dict[str, Any]:
    """Go on with RMM from a checkpoint without it, and without it from that one; return what happened."""
    settings_off = {"rmm": {"enabled": False}}

    def go_on(number: int, load: str | None, **sections: Any) -> tuple[str, Any]:
        engine = build(1, **sections)
        if load:
            engine.load_checkpoint(folder, tag=load)
        before = digest(engine)
        step(engine, number)
        engine.save_checkpoint(folder, tag=f"step{number}")
        return before, digest(engine) if number < 2 else dict(engine.ds_efficient.metrics)

    _, dense = go_on(0, None, **settings_off)
    loaded, sketched = go_on(1, "step0")
    loaded_again, metrics = go_on(2, "step1", **settings_off)
    return {"kept": [dense == loaded, sketched == loaded_again], "moved": dense != sketched, "left": metrics}


def hugging_face() -> dict[str, Any]:
    """Train a GPT-2 of transformers on one sentence."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape: dict[str, Any] = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **shape))
    names = list(model.state_dict())
    config = settings(2, rmm={"modules": ["c_attn", "c_fc", "mlp.c_proj"]})
    engine = ds_efficient.initialize(model=model, config=config | {"train_micro_batch_size_per_gpu": 2})[0]
    tokens = (torch.arange(2 * 64) ** 2 % 61).view(2, 64)
    losses = []
    for _ in range(12):
        for _ in range(MICRO_BATCHES):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        losses.append(float(loss.detach()))
    counts = dict(engine.ds_efficient.evidence()["rmm"].counts)
    return {"losses": losses, "counts": counts, "names": list(model.state_dict()) == names}


# Tensor-parallel layers (megatron/test_rmm_linears.py).

LAYER_KEY = Key(3, ("rmm", "some.layer"))


def _install(layer: Any, *, ratio: float = 0.25, step: int = 2, rank: int = 1) -> Sketch:
    clock = Clock(step=step, rank=rank)
    sketch = Sketch(LAYER_KEY, ratio=ratio, block_size=0, min_rows=1, clock=clock)
    layer.install_product(RandomizedProduct(sketch), layer.weight.detach())
    return sketch


def _all_rows(part: Tensor) -> Tensor:
    pieces = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, part.contiguous())
    return torch.cat(pieces)


def _flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1])


def _error(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None and found.shape == expected.shape and expected.abs().max() > 0
    return float((found - expected).abs().max())


def _step(layer: Any, x: Tensor, *, same: bool, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the output and the gradient that was given for it.

    Args:
        layer, x: what is called with what.
        same: the output is the same on all ranks, and so is its gradient.
        recompute: by megatron-core's checkpoint.
    """
    from megatron.core import tensor_parallel

    def forward(x: Tensor) -> Tensor:
        return layer(x)[0]

    out = tensor_parallel.checkpoint(forward, False, x) if recompute else forward(x)
    start = 9000 + (0 if same else 300 * dist.get_rank())
    dy = numbers(*out.shape, scale=1.0, start=start, like=out)
    out.backward(dy)
    return out.detach(), dy


def compare(kind: str, tensor: int, sequence: bool) -> dict[str, float]:
    """Return the largest differences from megatron-core's own layer, and from S written out."""
    from megatron_ranks import start

    start(tensor=tensor)
    options = {"bias": True, "skip_bias_add": False}
    options |= {} if kind == "column" else {"input_is_parallel": True}
    made = _settings(tensor, sequence)
    theirs, ours, again = (_layer(kind, seam, made, options) for seam in (False, True, True))
    xs = [_input(kind, made, options) for _ in range(3)]
    sketch = _install(ours)
    _install(again)
    same = kind == "row" and not sequence
    expected, dy = _step(theirs, xs[0], same=same)
    found, _ = _step(ours, xs[1], same=same)
    result = {
        "output": _error(found, expected),
        "recomputed output": _error(_step(again, xs[2], same=same, recompute=True)[0], expected),
        "input gradient": _error(xs[1].grad, xs[0].grad),
        "bias gradient": _error(ours.bias.grad, theirs.bias.grad),
        "recomputed weight gradient": _error(again.weight.grad, ours.weight.grad),
    }
    shards = tensor if sequence and kind == "column" else 1
    rows, gradient = _flat(xs[0]), _flat(dy)
    if sequence:
        rows, gradient = (_all_rows(rows), gradient) if kind == "column" else (rows, _all_rows(gradient))
    key = LAYER_KEY.fold(2, 0, 1)
    keys = [key] if shards == 1 else [key.fold(shard) for shard in range(shards)]
    parts = partition(len(rows) // shards, 0.25, block_size=0, min_rows=1)
    s = torch.block_diag(*(sketch_matrix(one, "gaussian", parts, dtype=torch.float64) for one in keys))
    result["weight gradient"] = _error(ours.weight.grad, (s.t() @ gradient).t() @ (s.t() @ rows))
    result["rows kept"] = float(sketch.tally.projected)
    return result


def saved(tensor: int, sequence: bool) -> list[tuple[tuple[int, ...], bool]]:
    """Return shape and whether it is a parameter of all that a column-parallel layer saves."""
    from megatron_ranks import start

    start(tensor=tensor)
    made, options = _settings(tensor, sequence), {"bias": True, "skip_bias_add": False}
    layer = _layer("column", True, made, options)
    _install(layer)
    kept: list[tuple[tuple[int, ...], bool]] = []

    def pack(value: Tensor) -> Tensor:
        if value.is_floating_point():
            kept.append((tuple(value.shape), isinstance(value, torch.nn.Parameter)))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(_input("column", made, options))
    return kept


def refusal() -> str:
    """Return what is said where megatron-core would add the gradient to main_grad in its own kernel."""
    from unittest import mock

    from megatron_ranks import start

    start(tensor=1)
    layer = _layer("column", True, _settings(1, False), {"bias": True, "skip_bias_add": False})
    with mock.patch.object(layer.config, "gradient_accumulation_fusion", True):
        try:
            _install(layer)
        except ds_efficient.UserError as error:
            return str(error)
    return ""


def sharded() -> list[str]:
    """Return the names that a layer with a sketch gives to megatron-core's checkpoints."""
    from megatron.core import parallel_state
    from megatron_ranks import start

    start(tensor=2)
    layer = _layer("column", True, _settings(2, False), {"bias": True, "skip_bias_add": False})
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    before = set(layer.sharded_state_dict(metadata=groups))
    _install(layer)
    assert set(layer.sharded_state_dict(metadata=groups)) == before
    return sorted(name for name in before if not name.endswith("_extra_state"))
