"""What the ranks of the random-LTD tests run: layers of megatron-core, and a small network in an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_steps import step_over

import ds_efficient
from ds_efficient.core.keys import Key
from ds_efficient.core.layer_seam import Kept
from ds_efficient.core.passes import Passes
from ds_efficient.errors import UserError
from ds_efficient.random_ltd.config import TokenScheduleConfig
from ds_efficient.random_ltd.layer import LayerDrop
from ds_efficient.random_ltd.sampler import TokenSampler

LENGTH, SAMPLES, HIDDEN, KEPT = 16, 3, 32, 6
KEY = Key(9, ("random_ltd",))


def sampler(kept: int = KEPT) -> TokenSampler:
    schedule = {"min_value": kept, "schedule_config": {"require_steps": 10**6, "seq_per_step": 2}}
    made = TokenSampler(KEY, TokenScheduleConfig.model_validate(schedule), Passes())
    made.layers = [0]
    return made


class Strata(LayerDrop):
    """Chooses on one rank what `parts` sequence-parallel ranks choose."""

    parts = 2

    def choose(self, **arguments: Any) -> Kept | None:
        found = super().choose(**{**arguments, "shards": self.parts})
        return None if found is None else Kept(found.index, found.index)


# ---- layers of megatron-core ----

CASES: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rotary": {"rotary": True},
    "rotary, documents, groups": {"rotary": True, "documents": True, "num_query_groups": 2},
    "bias": {"bias": True},
}


def _transformer_config(tensor: int, sequence: bool, **changes: Any) -> Any:
    import megatron_ranks

    return megatron_ranks.config(
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        use_cpu_initialization=True,
        **changes,
    )


def _layer(config: Any, *, drops: bool = True) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from megatron_patches.layer_spec import layer_spec

    efficiency: Any = SimpleNamespace(enabled=lambda: [], random_ltd=SimpleNamespace(enabled=drops))
    torch.manual_seed(7)
    return build_module(
        layer_spec(efficiency, transformer_config=config), config=config, layer_number=1
    ).train()


def _arguments(case: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return what is positional, for the whole sequence."""
    arguments: dict[str, Any] = {"attention_mask": None}
    if case.get("rotary"):
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        arguments["rotary_pos_emb"] = RotaryEmbedding(config.kv_channels, 1.0)(LENGTH)
    if case.get("documents"):
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None].repeat(SAMPLES, 1, 1, 1)
        for sample, start in enumerate((4, 9, 12)):
            hidden[sample, :, start:, :start] = True
        arguments["attention_mask"] = hidden
    if case.get("bias"):
        generator = torch.Generator().manual_seed(6)
        arguments["attention_bias"] = torch.randn(1, 1, LENGTH, LENGTH, generator=generator)
        arguments["attention_mask"] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return arguments


def _states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (LENGTH, SAMPLES, HIDDEN)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def layers(tensor: int, sequence: bool, parts: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """Return outputs and input gradients (whole sequence), and the kept tokens, of every case."""
    import megatron_ranks

    megatron_ranks.start(tensor=tensor)
    results = {}
    for name, case in CASES.items():
        groups = {key: value for key, value in case.items() if key == "num_query_groups"}
        config = _transformer_config(tensor, sequence, **groups)
        layer = _layer(config)
        drop = (Strata if parts > 1 else LayerDrop)("layer 0", 0, sampler())
        layer.install_token_drop(drop)
        states, weights = _states()
        rank, size = (dist.get_rank(), tensor) if sequence else (0, 1)
        x, local = (whole.chunk(size)[rank].clone() for whole in (states, weights))
        x.requires_grad_()
        y, context = layer(hidden_states=x, **_arguments(case, config))
        assert context is None
        (y * local).sum().backward()
        index = drop.sampler.index(0, 0, LENGTH, KEPT, SAMPLES, x.device, 2 if sequence else parts)
        results[name] = {"y": _whole(y, size), "dx": _whole(x.grad, size), "index": index.numpy()}
        if tensor == 1 and parts == 1:
            results[name] |= _reference(layer, case, config, index)
    return results


def _whole(part: Any, size: int) -> np.ndarray:
    parts = [torch.empty_like(part) for _ in range(size)]
    if size > 1:
        dist.all_gather(parts, part.detach().contiguous())
    else:
        parts = [part.detach()]
    return torch.cat(parts).numpy()


def _reference(layer: Any, case: dict[str, Any], config: Any, index: torch.Tensor) -> dict[str, np.ndarray]:
    """Run megatron-core's own layer on the whole sequence with the dropped keys hidden from everybody."""
    plain = _layer(config, drops=False)
    assert type(plain).__name__ == "TransformerLayer"
    plain.load_state_dict(layer.state_dict())
    states, weights = _states()
    x = states.clone().requires_grad_()
    arguments = _arguments(case, config)
    dropped = torch.ones(SAMPLES, LENGTH, dtype=torch.bool).scatter_(1, index, False)
    mask = arguments["attention_mask"]
    if mask is None:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    arguments["attention_mask"] = mask | dropped[:, None, None, :]
    y = plain(hidden_states=x, **arguments)[0]
    y = torch.where(dropped.t()[:, :, None], x, y)
    (y * weights).sum().backward()
    assert x.grad is not None
    return {"expected y": y.detach().numpy(), "expected dx": x.grad.numpy()}


def checkpoint_names() -> dict[str, list[str]]:
    """Return names in the state dicts of a model with and without the layer that drops tokens."""
    import megatron_ranks

    megatron_ranks.start()
    from megatron.core.models.gpt import GPTModel

    from megatron_patches.layer_spec import block_spec, layer_spec

    config = _transformer_config(1, False)
    found = {}
    for drops in (False, True):
        efficiency: Any = SimpleNamespace(enabled=lambda: [], random_ltd=SimpleNamespace(enabled=drops))
        spec = layer_spec(efficiency, transformer_config=config)
        block = block_spec(config, lambda index, spec=spec: spec)
        model = GPTModel(config=config, transformer_layer_spec=block, vocab_size=64, max_sequence_length=16)
        if drops:
            model.decoder.layers[1].install_token_drop(LayerDrop("layer 1", 1, sampler()))
        for kind in ("state_dict", "sharded_state_dict"):
            found[f"{kind} {drops}"] = sorted(getattr(model, kind)())
    return found


def bypasses() -> dict[str, bool]:
    """Return whether a layer processes all tokens where it has to."""
    import megatron_ranks

    megatron_ranks.start()
    config = _transformer_config(1, False)
    layer = _layer(config)
    x = _states()[0]
    expected = layer(hidden_states=x, attention_mask=None)[0]
    found = {}
    layer.install_token_drop(LayerDrop("layer 0", 0, sampler(LENGTH)))
    found["all kept"] = torch.equal(layer(hidden_states=x, attention_mask=None)[0], expected)
    layer.install_token_drop(LayerDrop("layer 0", 0, sampler()))
    found["training drops"] = not torch.equal(layer(hidden_states=x, attention_mask=None)[0], expected)
    found["positional arguments"] = not torch.equal(layer(x, None)[0], expected)
    with torch.no_grad():
        found["no gradients"] = torch.equal(layer(hidden_states=x, attention_mask=None)[0], expected)
    layer.eval()
    found["evaluation"] = torch.equal(layer(hidden_states=x, attention_mask=None)[0], expected)
    return found


def refusals() -> dict[str, str]:
    """Return the messages about what cannot be had for some of the tokens."""
    import megatron_ranks

    megatron_ranks.start()
    config = _transformer_config(1, False)
    layer = _layer(config)
    found = {}
    for name, value in (
        ("context_parallel_size", 2),
        ("apply_rope_fusion", True),
        ("fused_single_qkv_rope", True),
        ("multi_latent_attention", True),
        ("window_size", (4, 0)),
        ("overlap_moe_expert_parallel_comm", True),
        ("enable_cuda_graph", True),
    ):
        before = getattr(config, name, None)
        setattr(config, name, value)
        try:
            layer.install_token_drop(LayerDrop("layer 0", 0, sampler()))
        except UserError as error:
            found[name] = str(error)
        setattr(config, name, before)
    layer.install_token_drop(LayerDrop("layer 0", 0, sampler()))
    for name in ("packed_seq_params", "context"):
        try:
            layer(hidden_states=_states()[0], attention_mask=None, **{name: object()})
        except UserError as error:
            found[name] = str(error)
    return found


# ---- a small network in an engine ----

WIDTH, TOKENS, BATCH, MICRO_BATCHES, LR = 16, 12, 4, 2, 1e-2


class Block(torch.nn.Module):
    """A residual block in which tokens see their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.fc(x) + x.mean(1, keepdim=True))


class Net(torch.nn.Module):
    """Four blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = torch.nn.Linear(4, WIDTH)
            self.layers = torch.nn.ModuleList(Block() for _ in range(4))
            self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return (self.head(hidden) - x.sin()).float().square().mean()


def settings(stage: int = 0, **ltd: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration; the kept tokens grow from 4 by 2 until step 8."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    general = ltd.pop("sections", {})
    schedule = {"min_value": 4, "schedule_config": {"require_steps": 8, "seq_per_step": 2}}
    section = {"enabled": True, "random_ltd_schedule": schedule, **ltd}
    return {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
        "ds_efficient": {"seed": 5, "evidence_steps": 2},
        "data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": section}},
        **general,
    }


def build(stage: int = 0, *, scheduler: Any = None, **ltd: Any) -> Any:
    """Return an engine around a `Net`."""
    return ds_efficient.initialize(model=Net(), config=settings(stage, **ltd), lr_scheduler=scheduler)[0]


def step(engine: Any, number: int, length: int = TOKENS) -> float:
    """Run one optimizer step on this rank's samples; return the loss of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def own(micro: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * number + micro)
        return torch.randn(BATCH, length, 4, generator=generator).chunk(world)[rank]

    return step_over(engine, map(own, range(MICRO_BATCHES)))


def _technique(engine: Any) -> Any:
    return engine.ds_efficient.techniques[0]


def train(stages: list[int], steps: int, ltd: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Train at each stage; return losses, learning rates, metrics, counts, names of the state dict."""
    results = {}
    for stage in stages:
        engine = build(stage, **ltd)
        losses, rates, metrics = [], [], []
        for number in range(steps):
            rates.append(engine.get_lr()[0])
            losses.append(step(engine, number))
            metrics.append(dict(engine.ds_efficient.metrics["random_ltd"]))
        proof = engine.ds_efficient.evidence()["random_ltd"]
        results[stage] = {
            "losses": losses,
            "rates": rates,
            "metrics": metrics,
            "evidence": proof,
            "actions": [(a.module, a.action, a.reason) for a in engine.ds_efficient.actions["random_ltd"]],
            "now": [dict(a.options) for a in engine.ds_efficient.actions_now()["random_ltd"]],
            "names": sorted(engine.module.state_dict()),
            "deepspeed": str(engine.config["data_efficiency"]["data_routing"]["random_ltd"]["enabled"]),
            "deepspeed scheduler": hasattr(engine, "random_ltd_scheduler"),
        }
    return results


def resume(folder: str, stage: int, ltd: dict[str, Any]) -> dict[str, Any]:
    """Train six steps, save after the third, load into a new engine and train the last three again."""
    engine = build(stage, **ltd)
    first = [step(engine, number) for number in range(3)]
    engine.save_checkpoint(folder)
    rest = [(step(engine, number), engine.get_lr()[0]) for number in (3, 4, 5)]
    state = _technique(engine).state_dict()
    again = build(stage, **ltd)
    again.load_checkpoint(folder)
    loaded = _technique(again).state_dict()
    resumed = [(step(again, number), again.get_lr()[0]) for number in (3, 4, 5)]
    return {
        "first": first,
        "rest": rest,
        "resumed": resumed,
        "loaded": loaded,
        "states": (state, _technique(again).state_dict()),
    }


def evaluation() -> dict[str, Any]:
    """Return losses of a batch in evaluation mode, of the engine and of the bare network."""
    engine = build()
    data = torch.randn(BATCH, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    engine.eval()
    with torch.no_grad():
        found = float(engine(data))
    engine.train()
    with torch.no_grad():
        unmarked = float(engine(data))
    counts = engine.ds_efficient.evidence()["random_ltd"].counts["tokens"]
    return {"found": found, "unmarked": unmarked, "expected": float(Net()(data)), "counts": counts}


def lengths(steps: int) -> list[dict[str, float]]:
    """Train on sequences whose length changes from step to step and from rank to rank."""
    engine = build()
    found = []
    for number in range(steps):
        step(engine, number, TOKENS + 4 * number + 2 * dist.get_rank())
        found.append(dict(engine.ds_efficient.metrics["random_ltd"]))
    return found


def refused(ltd: dict[str, Any], scheduler: bool = False) -> str:
    """Return the refusal of a configuration, or of training with it."""
    try:
        given = (lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, float)) if scheduler else None
        engine = build(scheduler=given, **ltd)
        for number in range(3):
            step(engine, number)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train_without(steps: int) -> list[float]:
    """Train without any technique; return the losses."""
    config = settings()
    config.pop("data_efficiency")
    engine = ds_efficient.initialize(model=Net(), config=config)[0]
    return [step(engine, number) for number in range(steps)]
