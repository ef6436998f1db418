"""Rules of this code base, as functions from a parsed module to findings (see `unit/test_house_rules.py`)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("ds_efficient", "megatron_patches", "launch")
TECHNIQUES = ("slope", "rmm", "mkor", "random_ltd", "lgreco")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# The script is meant to be read from top to bottom.
LONGER_FUNCTIONS = {"launch/pretrain_gpt.py main": 80}

# From low to high. A module imports from its own layer and from those above it in this list. Techniques are
# layers of one height that do not see each other, and so are core and report.
_CORE_BASE = tuple(
    f"ds_efficient.core.{name}"
    for name in (
        "keys passes technique shape inventory inventory_torch layout linear_seam plain_linears "
        "layer_seam weight_gradient state gpu_peaks deepspeed_compat deepspeed_files deepspeed_schema "
        "deepspeed_gradients deepspeed_reduction compact_weight"
    ).split()
)
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("ds_efficient.errors", "ds_efficient.version", "ds_efficient.registry"),),
    (("ds_efficient.config.base", "ds_efficient.config.fields"),),
    (_CORE_BASE,),
    (("ds_efficient.op_builder",),),
    (("ds_efficient.ops",),),
    tuple((f"ds_efficient.{name}",) for name in TECHNIQUES),
    (("ds_efficient.config",),),
    (("ds_efficient.core",), ("ds_efficient.report",), ("ds_efficient.export",)),
    (("ds_efficient.commands", "ds_efficient.cli", "ds_efficient.__main__", "ds_efficient"),),
    (("megatron_patches",),),
    (("launch", "pretraining", "preflight"),),
)

DEEPSPEED_INTERNALS = (
    "ds_efficient/core/deepspeed_compat.py",
    "ds_efficient/core/deepspeed_schema.py",
    "ds_efficient/op_builder/builder.py",
)
DEEPSPEED_PUBLIC = {"__version__", "initialize", "init_distributed", "add_config_arguments", "zero"}
# DeepSpeed is dropping these; random-LTD here is our own.
DEEPSPEED_NEVER = ("deepspeed.runtime.data_pipeline", "deepspeed.ops.random_ltd")

# megatron-core's documented interface, which the training script may use without going through a patch.
MEGATRON_PUBLIC = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.TransformerConfig",
    "megatron.core.models.gpt.GPTModel",
    "megatron.core.datasets",
)

# The dropout streams of megatron-core, and the initial weights of a Hugging Face model.
GLOBAL_RANDOM_ALLOWED = ("launch/pretraining/processes.py", "launch/train_hf_gpt2.py")
_TORCH_DRAWS = set(
    "manual_seed seed rand randn randint randperm rand_like randn_like randint_like normal bernoulli "
    "multinomial poisson".split()
)
_IN_PLACE_DRAWS = set(
    "normal_ uniform_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_".split()
)
_OWN_GENERATORS = set("Generator Philox PCG64 SeedSequence default_rng Random".split())

_PICKLING = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
_PICKLE_ERRORS = ("PickleError", "PicklingError", "UnpicklingError")

# Paths of some developer's machine, and hosts of package registries.
PRIVATE_TEXT = re.compile(
    r"(?<![\w.])/(?:home/(?!x\b)|root/|Users/|work/)|/tmp/dev\b|[\w.-]*pypi\w*\.org|pythonhosted"
)


@dataclass(frozen=True)
class Module:
    """One Python file.

    Attributes:
        path: relative to the repository, with slashes.
        source: text.
    """

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """Syntax tree."""
        return ast.parse(self.source)

    @property
    def name(self) -> str:
        """Dotted name as it is imported; ``launch`` is on the path, so its packages stand at the top."""
        name = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return name.removeprefix("launch.") if name.count(".") > 1 or name.endswith("preflight") else name


def modules(*folders: str) -> list[Module]:
    """Return the Python files below `folders` of the repository."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def long_files(module: Module) -> Iterator[str]:
    """Files longer than the limit."""
    lines = module.source.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{module.path}: {lines} lines, at most {MAX_FILE_LINES}"


def long_functions(module: Module) -> Iterator[str]:
    """Functions longer than the limit; neither decorators nor the docstring count."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            first = node.body[0]
            lines -= (first.end_lineno or first.lineno) - first.lineno + 1
        limit = LONGER_FUNCTIONS.get(f"{module.path} {node.name}", MAX_FUNCTION_LINES)
        if lines > limit:
            yield f"{module.path}:{node.lineno} {node.name}: {lines} lines, at most {limit}"


def undocumented(module: Module) -> Iterator[str]:
    """Modules, public classes and public functions or methods without a docstring."""
    if not ast.get_docstring(module.tree):
        yield f"{module.path}: no module docstring"
    pending: list[ast.Module | ast.ClassDef] = [module.tree]
    while pending:
        for node in pending.pop().body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield f"{module.path}:{node.lineno} {node.name}: no docstring"
            if isinstance(node, ast.ClassDef):
                pending.append(node)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import that happens at run time, those inside functions included."""
    pending: list[ast.AST] = [module.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        if _is_type_checking(node):
            pending += node.orelse  # type: ignore[attr-defined]
        else:
            pending += ast.iter_child_nodes(node)


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str) -> tuple[int, tuple[str, ...]] | None:
    """Return (height, layer) of a dotted name by its longest known prefix; None outside the project."""
    best: tuple[int, int, tuple[str, ...]] | None = None
    for height, group in enumerate(LAYERS):
        for layer in group:
            for prefix in layer:
                # `ds_efficient.initialize` is the package's face, `ds_efficient.core` is not.
                if _inside(name, prefix) and (best is None or len(prefix) > best[0]):
                    best = (len(prefix), height, layer)
    return None if best is None else best[1:]


def wrong_way(module: Module) -> Iterator[str]:
    """Imports from a higher layer, or from another layer of the same height."""
    own = layer_of(module.name)
    assert own is not None, f"{module.path} ({module.name}) is in no layer; add it to LAYERS"
    for line, name in imports(module):
        other = layer_of(name)
        if other is not None and other != own and other[0] >= own[0]:
            yield f"{module.path}:{line} imports {name}, which is not below it"


def deepspeed_internals(module: Module) -> Iterator[str]:
    """DeepSpeed's submodules and private names outside the files that may touch them."""
    for line, name in imports(module):
        if any(_inside(name, never) for never in DEEPSPEED_NEVER):
            yield f"{module.path}:{line} imports {name}, which DeepSpeed is dropping"
        elif name.startswith("deepspeed.") and module.path not in DEEPSPEED_INTERNALS:
            if name.split(".")[1] not in DEEPSPEED_PUBLIC:
                yield f"{module.path}:{line} imports {name}; go through ds_efficient.core.deepspeed_compat"
    whole = any(name == "deepspeed" for _, name in imports(module))
    if module.path in DEEPSPEED_INTERNALS or not whole:
        return
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "deepspeed"
        ):
            if node.attr not in DEEPSPEED_PUBLIC:
                yield f"{module.path}:{node.lineno} uses deepspeed.{node.attr}"


def megatron_internals(module: Module) -> Iterator[str]:
    """megatron-core outside megatron_patches, except its documented interface in launch/."""
    if module.path.startswith("megatron_patches/"):
        return
    for line, name in imports(module):
        if not _inside(name, "megatron") or name == "megatron.core":
            continue
        if module.path.startswith("ds_efficient/"):
            yield f"{module.path}:{line} imports {name}: ds_efficient works without megatron-core"
        elif not any(_inside(name, public) for public in MEGATRON_PUBLIC):
            yield f"{module.path}:{line} imports {name}; go through megatron_patches"


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_random(module: Module) -> Iterator[str]:
    """Draws from torch's, numpy's or Python's global generator."""
    if module.path in GLOBAL_RANDOM_ALLOWED:
        return
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        home, _, name = _dotted(node.func).rpartition(".")
        own = any(keyword.arg == "generator" for keyword in node.keywords)
        in_torch = (home == "torch" and name in _TORCH_DRAWS) or node.func.attr in _IN_PLACE_DRAWS
        elsewhere = home in ("random", "np.random", "numpy.random") and name not in _OWN_GENERATORS
        if (in_torch and not own) or elsewhere:
            called = _dotted(node.func) or node.func.attr
            yield f"{module.path}:{node.lineno} calls {called}: draw by key instead"


def pickles(module: Module) -> Iterator[str]:
    """Ways of reading files that run code from them."""
    for line, name in imports(module):
        home, _, rest = name.partition(".")
        if home in _PICKLING and (home != "pickle" or (rest and rest not in _PICKLE_ERRORS)):
            yield f"{module.path}:{line} imports {name}"
    for node in ast.walk(module.tree):
        home, _, rest = _dotted(node).partition(".")
        if home == "pickle" and rest and rest not in _PICKLE_ERRORS:
            yield f"{module.path}:{node.lineno} uses pickle.{rest}"  # type: ignore[attr-defined]
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        name = _dotted(node.func)
        if name == "torch.load" and given.get("weights_only") is not True:
            yield f"{module.path}:{node.lineno} torch.load without weights_only=True"
        if given.get("allow_pickle") is True:
            yield f"{module.path}:{node.lineno} {name} with allow_pickle=True"


def private_text(path: str, text: str) -> Iterator[str]:
    """Paths of a developer's machine and registry hosts."""
    for number, line in enumerate(text.splitlines(), 1):
        found = PRIVATE_TEXT.search(line)
        if found:
            yield f"{path}:{number} mentions {found.group()}"
