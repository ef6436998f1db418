"""What the ranks of the tests of L-GreCo run: a small network through the engine, and the reducer alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_steps import digest, parameter_dtype, step_over
from pretraining.failure import is_lost_connection
from torch import Tensor

import ds_efficient
from ds_efficient.core import deepspeed_compat as compat
from ds_efficient.core.keys import Key
from ds_efficient.lgreco import QSGD as QSGD_COMPRESSOR
from ds_efficient.lgreco import Reducer
from ds_efficient.lgreco.transport import make_transport
from ds_efficient.lgreco.wire import slice_of

LR, STEPS, ROWS, SEED = 1e-2, 6, 8, 5
WIDTHS = {"fc1": (48, 64), "fc2": (64, 33), "head": (33, 4)}
QSGD = {"compressor": "qsgd", "default": 4, "range": [2, 8]}
POWERSGD = {"compressor": "powersgd", "default": 4, "range": [2, 8]}
TOPK = {"compressor": "topk", "default": 0.1, "range": [0.02, 0.5]}
SLOPE = {"enabled": True, "modules": ["fc1", "fc2"], "adapter": {"rank": 2, "start_step": 3}}
SavedCase = tuple[int, str, dict[str, Any], tuple[int, ...]]  # stage, precision, sections, resumed after
MIXED = {"compressor": "mixed", "default": 4, "range": [2, 8]}


class Net(torch.nn.Module):
    """Three linear layers, of which two are large enough to be compressed; the loss is a square distance."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, (inputs, outputs) in WIDTHS.items():
                self.add_module(name, torch.nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        return (y - x[..., :4].sin()).float().square().mean()


def settings(stage: int, precision: str = "fp32", micro_batches: int = 2, **sections: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration; ``lgreco=None`` leaves the section out."""
    precisions: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        "bf16 summed in fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    }
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4000}
    raw = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "ds_efficient": {"seed": SEED, "evidence_steps": 3},
        **precisions[precision],
        **sections,
        "zero_optimization": {**zero, **sections.get("zero_optimization", {})},
    }
    section = raw.pop("lgreco", None)
    return raw if section is None else {**raw, "lgreco": {"enabled": True, "interval": 3, **section}}


def build(stage: int, precision: str = "fp32", **sections: Any) -> Any:
    """Return an engine around a `Net`."""
    return ds_efficient.initialize(model=Net(), config=settings(stage, precision, **sections))[0]


def batch(number: int, micro: int, rank: int) -> Tensor:
    """Return one rank's data of a micro-batch."""
    seed = 100 * number + 10 * micro + rank
    return torch.randn(ROWS, WIDTHS["fc1"][0], generator=torch.Generator().manual_seed(seed))


def step(engine: Any, number: int) -> float:
    """Run one optimizer step; return the loss of all ranks."""
    dtype, micro_batches = parameter_dtype(engine), range(engine.gradient_accumulation_steps())
    return step_over(engine, (batch(number, micro, dist.get_rank()).to(dtype) for micro in micro_batches))


def train(stage: int, precision: str, sections: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Train; return losses, a hash of the weights, and what the technique says."""
    engine = build(stage, precision, **sections)
    found: dict[str, Any] = {"losses": [], "metrics": []}
    for number in range(steps):
        found["losses"].append(step(engine, number))
        found["metrics"].append(dict(engine.ds_efficient.metrics.get("lgreco", {})))
    found["digest"] = digest(engine)
    proof = engine.ds_efficient.evidence().get("lgreco")
    if proof is not None:
        found |= {"counts": dict(proof.counts), "summary": proof.summary}
        found["choices"] = dict(engine.ds_efficient.techniques[-1].adaptive.current.choices)
    return found


def train_all(cases: list[tuple[int, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Train one engine after the other."""
    return [train(stage, precision, sections) for stage, precision, sections in cases]


class Lossless:
    """In the reducer's place: gathers each gradient by itself and averages, so that nothing is lost."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.raw_bytes = 0.0
        self.compressed = 1
        self.nbytes = 0

    def _mean(self, name: str, gradient: Tensor) -> Tensor:
        self.calls.append(name)
        everyone = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, gradient.contiguous())
        return sum(everyone[1:], everyone[0].clone()) / len(everyone)

    def reduce(self, gradients: Mapping[str, Tensor], *, scale: float) -> None:
        for name, gradient in gradients.items():
            gradient.copy_(self._mean(name, gradient))

    def reduce_scatter(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        means = {name: self._mean(name, gradient).view(-1) for name, gradient in gradients.items()}
        bounds = {
            name: slice_of(mean.numel(), dist.get_rank(), dist.get_world_size())
            for name, mean in means.items()
        }
        return {name: means[name][slice(*bounds[name])] for name in means}

    def commit(self) -> None:
        pass

    def take(self, choices: object) -> None:
        pass


def stand_in(stage: int, precision: str, micro_batches: int, zero: dict[str, Any]) -> dict[str, Any]:
    """Train without the section, and with it and a lossless stand-in for the reducer."""
    sections = {"micro_batches": micro_batches, "zero_optimization": zero}
    plain = train(stage, precision, sections, steps=4)
    quiet = {"seed": SEED, "evidence_steps": 100}  # the stand-in sends as much as DeepSpeed does
    engine = build(stage, precision, **sections, lgreco=QSGD, ds_efficient=quiet)
    reducer = Lossless()
    engine.ds_efficient.techniques[-1].adaptive.reducer = reducer
    losses = [step(engine, number) for number in range(4)]
    return {
        "plain": (plain["losses"], plain["digest"]),
        "replaced": (losses, digest(engine)),
        "calls": len(reducer.calls),
        "names": sorted(set(reducer.calls)),
    }


def everything(
    trained: list[tuple[int, str, dict[str, Any]]], replaced: list[tuple[int, str, int, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return `train_all` and `stand_ins`, in one process a rank."""
    return train_all(trained), stand_ins(replaced)


def stand_ins(cases: list[tuple[int, str, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run `stand_in` for one case after the other."""
    return [stand_in(*case) for case in cases]


def gradients_of(rank: int, number: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return one rank's gradients of a step of the reducer alone."""
    generator = torch.Generator().manual_seed(50 * number + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return them as arrays, which outlive this process."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def reduce_alone(
    compressors: list[Any], shapes: Mapping[str, tuple[int, ...]], backend: str = "auto"
) -> list[list[dict[str, Any]]]:
    """Reduce three steps with each compressor; return the means and errors after each."""
    if not dist.is_initialized():
        compat.init_distributed("gloo")
    found = []
    for compressor in compressors:
        transport = make_transport(backend, dist.group.WORLD, torch.device("cpu"))
        reducer = Reducer(default=compressor, transport=transport, key=Key(SEED))
        steps = []
        for number in range(3):
            gradients = gradients_of(dist.get_rank(), number, shapes)
            reducer.reduce(gradients)
            reducer.commit()
            errors = {f"error of {name}": error.clone() for name, error in reducer.errors().items()}
            steps.append(plain({**gradients, **errors, "bytes": torch.tensor(transport.sent.gradients)}))
        found.append(steps)
    return found


def reduce_on_gpus(
    compressors: list[Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[list[dict[str, Any]]]:
    """Do as `reduce_alone` over NCCL, each rank on a GPU of its own; return the means."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    compat.init_distributed("nccl")
    found = []
    for compressor in compressors:
        reducer = Reducer(default=compressor, key=Key(SEED))
        steps = []
        for number in range(3):
            made = gradients_of(dist.get_rank(), number, shapes)
            gradients = {name: value.cuda() for name, value in made.items()}
            reducer.reduce(gradients)
            reducer.commit()
            steps.append(plain({name: value.cpu() for name, value in gradients.items()}))
        found.append(steps)
    return found


def leave() -> str:
    """Rank 1 leaves after one step; return what the other one sees."""
    compat.init_distributed("gloo")
    reducer = Reducer(default=QSGD_COMPRESSOR(4), key=Key(SEED))
    shapes = {"w": (64, 64)}
    for number in range(2):
        if number == 1 and dist.get_rank() == 1:
            return "left"
        try:
            reducer.reduce(gradients_of(dist.get_rank(), number, shapes))
        except RuntimeError as error:  # what the training script makes of it
            return f"lost: {error}" if is_lost_connection(error) else f"unknown: {error}"
    return "nothing"


def skipped(stages: list[int]) -> list[dict[str, Any]]:
    """Train at each stage with and without a step in between whose gradients overflow on one rank."""
    return [_skipped(stage) for stage in stages]


def _skipped(stage: int) -> dict[str, Any]:
    section = {"lgreco": {**POWERSGD, "interval": 100}, "micro_batches": 1}
    plain = build(stage, "bf16", **section)
    for number in range(4):
        step(plain, number)
    engine = build(stage, "bf16", **section)
    for number in range(4):
        if number == 2:
            before = {name: error.clone() for name, error in _errors(engine).items()}
            bad = batch(number, 0, dist.get_rank()).to(torch.bfloat16)
            if dist.get_rank() == 1:
                bad[0, 0] = torch.inf
            engine.backward(engine(bad))
            engine.step()
            taken = engine.was_step_applied()
            same = all(torch.equal(error, before[name]) for name, error in _errors(engine).items())
        step(engine, number)
    return {"taken": taken, "same": same and bool(before), "equal": digest(plain) == digest(engine)}


def _errors(engine: Any) -> dict[str, Tensor]:
    return engine.ds_efficient.techniques[-1].adaptive.reducer.errors()


def save_and_resume(folder: str, cases: list[SavedCase]) -> list[dict[str, Any]]:
    """Return for each case an unbroken run, and those resumed from its checkpoints after steps 2 and 4."""

    def finish(engine: Any, first: int, where: str) -> dict[str, Any]:
        losses = []
        for number in range(first, STEPS):
            losses.append(step(engine, number))
            if first == 0 and engine.global_steps in (2, 4):
                engine.save_checkpoint(where)
        adaptive = engine.ds_efficient.techniques[-1].adaptive
        return {
            "losses": losses,
            "digest": digest(engine),
            "plans": adaptive.plans,
            "plan": adaptive.current.to_plain()["choices"],
            "error": adaptive.current.error,
            "errors": plain(adaptive.reducer.errors()),
        }

    results = []
    for case, (stage, precision, sections, after) in enumerate(cases):
        where = f"{folder}/{case}"
        found: dict[str, Any] = {"unbroken": finish(build(stage, precision, **sections), 0, where)}
        for first in after:
            engine = build(stage, precision, **sections)
            step(engine, 77)  # what the engine did before must not matter
            engine.load_checkpoint(where, tag=f"global_step{first}")
            found[str(first)] = finish(engine, first, where)
        results.append(found)
    return results


def load_elsewhere(folder: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint of another number of ranks; return errors and sums, and train on."""
    engine = build(0, "fp32", **sections)
    engine.load_checkpoint(folder, tag="global_step2")
    state = engine.ds_efficient.techniques[-1].adaptive.rank_state()
    found: dict[str, Any] = {part: plain(state[part]) for part in state}
    return {**found, "loss": step(engine, 2), "digest": digest(engine)}


def saved_parts(folder: str) -> list[dict[str, Any]]:
    """Return what each rank saved of its own, in the order of the ranks."""
    paths = sorted(Path(folder, "global_step2").glob("ds_efficient_shard_*.pt"))
    shards = [torch.load(path, weights_only=True)["shards"]["lgreco"] for path in paths]
    return [next(iter(one.values())) for one in shards]


def refused(cases: list[tuple[int, str, dict[str, Any]]]) -> list[str]:
    """Return the message with which each configuration is refused."""
    found = []
    for stage, precision, sections in cases:
        try:
            engine = build(stage, precision, **sections)
            for number in range(4):
                step(engine, number)
            found.append("")
        except ds_efficient.UserError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def saved_and_refused(
    folder: str, saved: list[SavedCase], wrong: list[tuple[int, str, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return `save_and_resume` and `refused`, in one process a rank."""
    return save_and_resume(folder, saved), refused(wrong)
