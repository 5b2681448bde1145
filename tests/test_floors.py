"""The house's plan: imports go down only, each heavy library has one door, files and functions keep their size."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("train", "parallel", "launch", "kernels")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

RELATIVE = [path.relative_to(ROOT).as_posix() for path in FILES]

# library -> the files that may import it
DOORS = {
    "deepspeed": {"parallel/zero/deepspeed_engine.py"},
    "wandb": {"train/track/wandb.py"},
    "tensorboard": {"train/track/tensorboard.py"},
    "torch.utils.tensorboard": {"train/track/tensorboard.py"},
    "hydra": {"train/compose.py", "train/typed.py"},
    "tokenizers": {"train/data/tokenizer.py"},
    "matplotlib": {
        *("train/view/curves.py", "train/view/rows.py"),
        *("launch/sweep/picture.py", "launch/plan/page/picture.py"),
    },
    "optuna": {"launch/sweep/optuna_search.py"},
    "transformer_engine": {"train/precision/transformer_engine.py"},
    "flash_attn": {"train/model/attention/gpu_cores.py"},
    "flash_attn_interface": {"train/model/attention/gpu_cores.py"},
    "datasets": {"train/data/read/hub.py"},
    "pyarrow": {"train/data/read/tables.py"},
    "zstandard": {"train/data/read/streams.py"},
    "safetensors": {"train/hf/tensor_files.py"},
    "transformers": set(),
    "triton": {"kernels/door.py"},
}
# Outside assembly, rules between rooms may read the pure arithmetic of `parallel`: no torch, no processes.
RULES = "train/config.py"
PURE = {
    *("parallel.mesh", "parallel.expert.placement", "parallel", "parallel.expert"),
    *("parallel.pipeline", "parallel.pipeline.registry", "parallel.pipeline.placement", "parallel.pipeline.schedule"),
}
# What lies below every room: torch's own names.
LOWEST = {"parallel.torch_names"}
# What a config is checked by, and a model counted: torch is not reached from here.
LIGHT = {"train.split", "train.flops", "train.model.config", "train.precision.config"}
# What a rank holds, and what puts it together: here the run meets the ranks.
MEETING = {"train/assemble.py", "train/job.py", "train/resume.py"}
# room of train -> the other rooms of train that its files may import. Files of `train/` itself may import all of them.
# `train` among them: the room reads the whole config, as the files of train/ do.
ROOMS_BELOW = {
    "train/cli": ("train",),
    "train/precision": (),
    "train/model": ("train/model/attention", "train/precision"),
    "train/model/attention": ("train/model", "train/precision"),
    "train/data": ("train/data/read",),
    "train/data/read": ("train/data",),
    "train/data/prepare": ("train/data", "train/data/read"),
    "train/data/rows": ("train/data", "train/data/read"),
    "train/checkpoint": (),
    "train/recipe": ("train/model", "train/checkpoint"),
    "train/hf": ("train/model", "train/model/attention", "train/precision", "train/data", "train/checkpoint"),
    "train/track": (),
    "train/view": ("train/track", "train/view/report"),
    "train/view/report": ("train/view", "train/track", "train/checkpoint"),
}
# Files of train/ itself that every room may use.
TOOLS = {"train.settings", "train.files", "train.environment"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {module_of(path): path for path in FILES}


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name in MODULES and MODULES[name] != path}


def room_of(path: str) -> str:
    """The folder that a file lies in, or the package that a module is."""
    return path.rsplit("/", 1)[0]


def forbidden(me: str, targets: set[str]) -> set[str]:
    """Those arrows from the file `me` to modules `targets` that the plan does not have."""
    bad = set()
    for target in targets:
        floor = target.split(".")[0]
        if me.startswith("kernels/") and floor != "kernels":
            bad.add(target)
        if me.startswith("parallel/") and floor not in ("parallel", "kernels"):
            bad.add(target)
        if me.startswith("train/"):
            meets = me in MEETING or (me == RULES and target in PURE) or target in LOWEST
            if floor == "launch" or (floor == "parallel" and not meets):
                bad.add(target)
            room = room_of(me)
            if room in ROOMS_BELOW and floor == "train" and target not in TOOLS:
                path = target.replace(".", "/")
                home = path if path in ROOMS_BELOW else room_of(path)
                if home not in (room, *ROOMS_BELOW[room]):
                    bad.add(target)
    return bad


def test_every_room_of_train_has_its_rule() -> None:
    """A folder without one would be free to import anything."""
    assert {room_of(me) for me in RELATIVE if me.startswith("train/")} - {"train"} == set(ROOMS_BELOW)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down_only(path: Path) -> None:
    assert not forbidden(path.relative_to(ROOT).as_posix(), ours(path))


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_arithmetic_needs_no_torch(name: str) -> None:
    assert not any(module.split(".")[0] == "torch" for module in imports(MODULES[name]))


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_a_model_is_checked_and_counted_without_torch(name: str) -> None:
    waiting, reached = [name], set[str]()
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += [target for target in ours(MODULES[module]) if target not in reached]
    assert not [m for m in sorted(reached) if any(each.split(".")[0] == "torch" for each in imports(MODULES[m]))]


@pytest.mark.parametrize("library", sorted(DOORS))
def test_heavy_libraries_have_one_door(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(f"{name}.".startswith(f"{library}.") for name in imports(path))
    }
    assert users <= DOORS[library]


def test_no_cycle_between_files() -> None:
    graph = {name: {t for t in ours(path) if not path.name.startswith("__init__")} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, road: tuple[str, ...]) -> None:
        assert name not in road, " -> ".join((*road, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*road, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", FILES, ids=RELATIVE)
def test_docstrings_stand_alone(path: Path) -> None:
    """A reader meets them one at a time: none opens as if the one before it had been read."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    said = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    assert [text for text in said if re.match(r"(Of|The same|As above|Likewise|Ditto)\b", text)] == []


@pytest.mark.parametrize(
    ("me", "target", "allowed"),
    [
        ("parallel/mesh.py", "train.config", False),
        ("parallel/mesh.py", "parallel.process", True),
        ("parallel/mesh.py", "kernels.operation", True),
        ("kernels/rms_norm.py", "parallel.mesh", False),
        ("kernels/rms_norm.py", "kernels.sums", True),
        ("train/model/moe.py", "parallel.expert.dispatch", False),
        ("train/model/moe.py", "train.data.rows.epochs", False),
        ("train/model/moe.py", "train.precision.linear", True),
        ("train/data/rows/epochs.py", "train.model.config", False),
        ("train/loop.py", "parallel.mesh", False),
        ("train/config.py", "parallel.mesh", True),
        ("train/config.py", "parallel.process", False),
        ("train/loop.py", "launch.local", False),
        ("train/assemble.py", "parallel.mesh", True),
        ("launch/local.py", "parallel.mesh", True),
    ],
)
def test_the_rule_itself(me: str, target: str, allowed: bool) -> None:
    assert (target not in forbidden(me, {target})) == allowed


# --- torch's own names ---


def private_names(path: Path) -> set[str]:
    """What of torch's a file imports or reaches whose path has a part that begins with one underscore."""
    known: dict[str, str] = {}
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    known[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in known:
                found.add(".".join([known[inner.id], *reversed(parts)]))
    return {name for name in found if any(re.match(r"_[^_]", part) for part in name.split("."))}


TORCH_NAMES = ROOT / "parallel" / "torch_names.py"


def test_private_names_of_torch_live_in_one_file() -> None:
    others = [*FILES, *(ROOT / "benchmarks").glob("*.py")]
    assert {path.name: private_names(path) for path in others if path != TORCH_NAMES and private_names(path)} == {}


def test_private_names_are_seen(tmp_path: Path) -> None:
    assert len(private_names(TORCH_NAMES)) >= 8
    file = tmp_path / "some.py"
    file.write_text(
        "import torch\nimport torch.distributed as dist\nfrom torch.utils import _pytree as trees\n"
        "torch._grouped_mm\ntorch.ops.aten._softmax(1)\ndist._world\ntrees.tree_map\ntorch.__version__\ntorch.mm\n"
    )
    assert private_names(file) == {
        "torch._grouped_mm",
        "torch.ops.aten._softmax",
        "torch.distributed._world",
        "torch.utils._pytree",
        "torch.utils._pytree.tree_map",
    }
