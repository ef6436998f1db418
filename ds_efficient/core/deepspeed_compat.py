"""The only place that touches DeepSpeed's internals; every access is guarded and tested.

Found by feature detection on the engine at hand, never by version number, except that versions older than
`MINIMUM_VERSION` are refused: several of them give wrong results under ZeRO.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_efficient.errors import ConfigError, UnsupportedVersion, UserError

logger = logging.getLogger(__name__)

MINIMUM_VERSION = "0.19.8"


def require_version() -> str:
    """Return DeepSpeed's version.

    Raises:
        UnsupportedVersion: older than `MINIMUM_VERSION`, or not installed.
    """
    from packaging.version import Version

    try:
        import deepspeed
    except ImportError as error:
        raise UnsupportedVersion(f"deepspeed cannot be imported ({error}); pip install deepspeed") from error
    if Version(deepspeed.__version__.split("+")[0]) < Version(MINIMUM_VERSION):
        raise UnsupportedVersion(
            f"deepspeed {deepspeed.__version__} is too old: ZeRO gives wrong gradients in several versions "
            f"before {MINIMUM_VERSION}; pip install 'deepspeed>={MINIMUM_VERSION}'"
        )
    return deepspeed.__version__


def init_distributed(backend: str | None = None, timeout_minutes: int | None = None) -> None:
    """Start torch.distributed through DeepSpeed, which reads the launcher's environment; once only.

    Without a launcher there is one process, on a port of its own: DeepSpeed would look for MPI instead.
    """
    import datetime
    import os

    import deepspeed

    if dist.is_initialized():
        return
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        single = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        for name, value in single.items():
            os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        _skip_shared_memory_collectives()
    kwargs: dict[str, Any] = {"verbose": False}
    if timeout_minutes is not None:
        kwargs["timeout"] = datetime.timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(dist_backend=backend, **kwargs)


def _skip_shared_memory_collectives() -> None:
    """Leave a machine without a GPU on gloo's own collectives.

    DeepSpeed would compile a shared-memory all-reduce first, 35 to 70 s on two cores, for inference's sake.
    """
    import deepspeed.ops

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False


def quiet_logging(level: int = logging.WARNING) -> None:
    """Set the level of DeepSpeed's own logger, which prints dozens of lines on every rank."""
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(level)


def initialize(**arguments: Any) -> tuple[Any, Any, Any, Any]:
    """Call deepspeed.initialize; its complaints about the configuration become ConfigErrors."""
    import deepspeed
    from pydantic import ValidationError

    try:
        return deepspeed.initialize(**arguments)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']} (got {item.get('input')!r})"
            for item in error.errors()
        ]
        raise ConfigError("DeepSpeed config", problems) from error


def require_plain_engine(engine: Any) -> None:
    """Refuse engines whose step is not the one we hook."""
    needed = ("_take_model_step", "is_gradient_accumulation_boundary", "save_checkpoint", "load_checkpoint")
    lacking = [name for name in needed if not hasattr(engine, name)]
    if lacking:
        raise UnsupportedVersion(
            f"{type(engine).__name__} of this DeepSpeed lacks {', '.join(lacking)}; "
            f"install a version from {MINIMUM_VERSION} that this project was tested with"
        )
    if any(base.__name__ in ("PipelineEngine", "DeepSpeedHybridEngine") for base in type(engine).__mro__):
        raise UserError(
            f"{type(engine).__name__}: not supported; launch/pretrain_gpt.py has pipeline parallelism of "
            "its own, through --pipeline-model-parallel-size"
        )


def on_model_step(engine: Any, before: Callable[[], None], after: Callable[[bool], None]) -> None:
    """Call `before` and `after` around every optimizer step of the engine.

    Args:
        engine: DeepSpeed engine.
        before: called at the accumulation boundary, gradients reduced, nothing clipped yet.
        after: called after the step with whether it was applied (False on fp16 overflow).
    """
    original = engine._take_model_step

    def take_model_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after(bool(self.was_step_applied()))
        return result

    engine._take_model_step = types.MethodType(take_model_step, engine)


def uses_plain_optimizer(engine: Any) -> bool:
    """Return whether the engine steps the optimizer itself (fp32, ZeRO 0), with no norm of its own."""
    return not hasattr(engine.optimizer, "_global_grad_norm")


def clip_plain_gradients(engine: Any, mpu: Any) -> Callable[[], None]:
    """Make an fp32, ZeRO 0 engine clip by the right norm and report it.

    DeepSpeed's own clipping there reports no norm, and counts tied embeddings of a pipeline twice.

    Returns:
        A function that computes the norm, stores it on the engine and clips; call it before each step.
    """
    if not hasattr(engine, "clip_fp32_gradients"):
        raise UnsupportedVersion("this DeepSpeed engine has no clip_fp32_gradients; see the tested versions")
    engine.clip_fp32_gradients = lambda: None

    def clip() -> None:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        norm = gradient_norm(parameters, mpu)
        engine._global_grad_norm = norm
        limit = float(engine.gradient_clipping() or 0.0)
        if limit > 0.0 and norm > limit:
            scale = limit / (norm + 1e-6)
            for parameter in parameters:
                parameter.grad.mul_(scale)

    return clip


def gradient_norm(parameters: Iterable[torch.nn.Parameter], mpu: Any = None) -> float:
    """Return the 2-norm of the gradients over all model-parallel ranks, each parameter counted once.

    Args:
        parameters: parameters of this rank, gradients already averaged over data-parallel ranks.
        mpu: DeepSpeed's model-parallel interface, or None without model parallelism.
    """
    first_rank = mpu is None or mpu.get_model_parallel_rank() == 0
    counted = [
        parameter.grad.detach().float()
        for parameter in parameters
        if parameter.grad is not None
        and not getattr(parameter, "ds_pipe_replicated", False)
        and (first_rank or getattr(parameter, "tensor_model_parallel", False))
    ]
    # One norm for each tensor, then the norm of these: the same order of sums whatever the layout's size.
    device = counted[0].device if counted else _device_of_group()
    norms = [torch.linalg.vector_norm(gradient.double()) for gradient in counted]
    total = (
        torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    )
    if mpu is not None and mpu.get_model_parallel_world_size() > 1:
        dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return float(total.sqrt())


def _device_of_group() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def fuse_zero_norm(engine: Any) -> bool:
    """Let ZeRO 1 and 2 compute the gradient norm in few kernels, and find an overflow by it.

    DeepSpeed converts each gradient to fp64 and takes its norm, and before that looks for inf and NaN in
    each: over a thousand launches a step with 1.3 B parameters. One multi-tensor norm with fp32 sums does
    both, since the norm is not finite exactly where a gradient is not.

    Returns:
        Whether it was installed: not with offloaded gradients, nor where the optimizer has another form.
    """
    optimizer = engine.optimizer
    needed = ("get_grad_norm_direct", "check_overflow", "_model_parallel_all_reduce", "dp_process_group")
    if not all(hasattr(optimizer, name) for name in needed) or getattr(optimizer, "cpu_offload", True):
        return False
    if list(inspect.signature(optimizer.get_grad_norm_direct).parameters) != [
        "gradients",
        "params",
        "norm_type",
    ]:
        return False
    original = optimizer.get_grad_norm_direct

    def norm(gradients: Iterable[torch.Tensor], params: Iterable[Any], norm_type: float = 2) -> torch.Tensor:
        if float(norm_type) != 2.0:
            return original(gradients, params, norm_type)
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        counted = [
            gradient.detach()
            for gradient, parameter in zip(real, params, strict=False)
            if not getattr(parameter, "ds_pipe_replicated", False)
            and (getattr(parameter, "tensor_model_parallel", False) or optimizer.model_parallel_rank == 0)
        ]
        total = torch.zeros((), dtype=torch.float32, device=optimizer.device)
        if counted:
            norms = torch._foreach_norm(counted, 2, dtype=torch.float32)
            total = torch.stack(list(norms)).double().square().sum().float()
        dist.all_reduce(total, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        # DeepSpeed's mark of an invalid norm is -1.
        return torch.where(total.isfinite(), total.sqrt(), torch.full_like(total, -1.0))

    optimizer.get_grad_norm_direct = norm
    if getattr(optimizer, "compute_grad_norm", False):
        optimizer.check_overflow = lambda partition_gradients=True: None
    return True


def gradient_norm_of_last_step(engine: Any) -> float | None:
    """Return the global gradient norm of the last step, before clipping, or None where there is none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def loss_scale(engine: Any) -> float | None:
    """Return the fp16 loss scale, None in other precisions."""
    if not engine.fp16_enabled():
        return None
    scale = getattr(engine.optimizer, "loss_scale", None)
    if scale is None:
        scale = getattr(engine.optimizer, "cur_scale", None)
    return None if scale is None else float(scale)


def set_checkpoint_rank(engine: Any, rank: int) -> None:
    """Set the model-parallel rank in checkpoint file names.

    DeepSpeed takes it from ``mpu.get_model_parallel_rank()``, which must be the tensor-parallel rank for
    the gradient norm; with pipeline stages the files would then overwrite each other.
    """
    if not hasattr(engine, "checkpoint_mp_rank"):
        raise UnsupportedVersion("this DeepSpeed engine has no checkpoint_mp_rank; see the tested versions")
    engine.checkpoint_mp_rank = rank


def refresh_master_weights(engine: Any) -> None:
    """Copy loaded half-precision weights into their fp32 copies.

    Without ZeRO, DeepSpeed leaves the copies as they were when it loads no optimizer state; the next step
    would bring the old weights back.
    """
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


@contextlib.contextmanager
def weights_view(engine: Any, load_dir: Path, tag: str) -> Iterator[str]:
    """Show DeepSpeed one ZeRO-3 checkpoint, and of the optimizer's files this tensor-parallel rank's only.

    Loading the weights of ZeRO-3 without the optimizer, DeepSpeed reads whatever ``latest`` names instead of
    `tag`, and takes the shards of all tensor-parallel ranks for parts of one model.
    """
    own = f"_mp_rank_{engine.checkpoint_mp_rank:02d}_optim_states.pt"
    with tempfile.TemporaryDirectory(prefix="ds_efficient_view_") as view:
        Path(view, "latest").write_text(tag)
        Path(view, tag).mkdir()
        for path in (load_dir / tag).iterdir():
            if path.name.endswith(("_model_states.pt", own)):
                Path(view, tag, path.name).symlink_to(path.resolve())
        yield view


def override(engine: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a public method on this engine only; `make` gets the original."""
    original = getattr(engine, name)
    replacement = make(original)
    replacement.__doc__ = original.__doc__
    setattr(engine, name, replacement)


def write_monitor_events(engine: Any, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Send the techniques' metrics to DeepSpeed's monitors as ``ds_efficient/<technique>/<metric>``."""
    monitor = getattr(engine, "monitor", None)
    if monitor is None or not getattr(monitor, "enabled", False):
        return
    events = [
        (f"ds_efficient/{technique}/{name}", value, engine.global_samples)
        for technique, values in metrics.items()
        for name, value in values.items()
    ]
    if events:
        monitor.write_events(events)


def whole(parameters: Iterable[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ZeRO-3 parameters are gathered, for reading; collective over their ranks."""
    import deepspeed

    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else contextlib.nullcontext()


def restart_adam(engine: Any, group_name: str) -> int:
    """Set the step counter of Adam's bias correction to 0 for the parameter groups called `group_name`.

    For parameters that had no gradient so far: their moments are 0 while the counter is not, so that the
    first updates would lack the bias correction and be up to 1 / sqrt(1 - beta2) times too large.

    Returns:
        How many counters were set; 0 where the optimizer has kept none yet.
    """
    base = engine.optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer
    numbers = [i for i, group in enumerate(base.param_groups) if group.get("name") == group_name]
    tensors = [tensor for number in numbers for tensor in base.param_groups[number]["params"]]
    group_of = getattr(engine.optimizer, "sub_group_to_group_id", {})  # ZeRO-3 hands groups over in parts
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    tensors += [tensor for part, tensor in enumerate(flat) if group_of.get(part) in numbers]
    count = 0
    for number in numbers:
        if "step" in base.param_groups[number]:
            base.param_groups[number]["step"] = 0
            count += 1
    for tensor in tensors:
        state = base.state.get(tensor, {})
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
            count += 1
    return count


def parameter_ids(groups: Sequence[Any]) -> set[int]:
    """Return the identities of all parameters in a list of parameters or of parameter groups."""
    found: set[int] = set()
    for item in groups:
        members = item["params"] if isinstance(item, dict) else [item]
        found.update(id(parameter) for parameter in ([members] if torch.is_tensor(members) else members))
    return found


def zero_stage(engine: Any) -> int:
    """Return ``zero_optimization.stage``."""
    return int(engine.zero_optimization_stage())
