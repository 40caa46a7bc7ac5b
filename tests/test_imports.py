"""One arrow through the layers, and an import that costs and changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekern
from sparsekern import errors

ROOT = Path(sparsekern.__file__).resolve().parent.parent

# A floor a line. A room may import from the floors above its own line, and from itself.
FLOORS = [
    ("sparsekern.errors",),
    ("sparsekern.devices", "sparsekern.kernels", "sparsekern.show"),
    ("sparsekern.topology",),
    ("sparsekern.ops",),
    ("sparsekern.nn",),
    ("sparsekern.carry", "sparsekern.counters", "sparsekern.distribution"),
    ("sparsekern.swap",),
    ("sparsekern.methods",),
    ("sparsekern.checkpoint",),
    ("sparsekern.cost",),
    ("sparsekern.tickets",),
    ("sparsekern.profiling", "sparsekern.planning"),
    ("sparsekern.models", "sparsekern.training", "sparsekern.tuning"),
    ("sparsekern.study",),
    ("sparsekern.integrations", "sparsekern.compat"),
    ("sparsekern.cli",),
    ("sparsekern.__main__",),
]


def room_of(module):
    """The floor of a module and its room there; None for the package itself and what is foreign."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return floor, room
    return None


def modules():
    for folder, package in ((ROOT / "sparsekern", "sparsekern"), (ROOT / "kernels", "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[0] == "kernels" and package == "sparsekern":
                continue  # the symlink
            name = ".".join((package if package == "sparsekern" else "sparsekern.kernels", *parts))
            yield name.removesuffix(".__init__"), path


def imported(name, path):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("name", "path"), [m for m in modules() if m[0] != "sparsekern"])
def test_no_import_runs_back_up_the_floors_or_to_a_neighbour(name, path):
    place = room_of(name)
    assert place is not None, f"{name} has no place in FLOORS"
    for target in imported(name, path):
        at = room_of(target)
        if at is not None:
            assert at[0] < place[0] or at == place, f"{name} imports {target}"
        if name.startswith("sparsekern.kernels.") and target.startswith("sparsekern"):
            assert target.startswith("sparsekern.kernels"), f"{name} imports {target}"


def test_every_room_exists():
    known = {name for name, _ in modules()}
    for room in (room for rooms in FLOORS for room in rooms):
        # the kernels' folder has no `__init__.py`
        assert room in known or any(name.startswith(f"{room}.") for name in known), room


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_and_training_need_no_optional_package():
    code = """
import sys
for name in ("triton", "numba", "sklearn", "matplotlib", "tqdm"):
    sys.modules[name] = None
import torch, sparsekern as sk
model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(32, 32)), 0.5, block=16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sk.RigL(model, optimizer, t_end=3, update_freq=1)
for _ in range(3):
    model(torch.ones(2, 32)).sum().backward()
    optimizer.step()
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_import_changes_no_global_state():
    code = """
import warnings, torch, random, numpy as np
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
          torch.get_float32_matmul_precision(), list(warnings.filters), random.getstate(),
          torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled())
import sparsekern
from sparsekern import errors
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
         torch.get_float32_matmul_precision(), list(warnings.filters), random.getstate(),
         torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled())
assert before == after
import sys
assert "numba" not in sys.modules
upper = ("cli", "compat", "integrations", "models", "study", "training", "tuning")
loaded = [n for n in sys.modules if n.startswith("sparsekern.") and n.split(".")[1] in upper]
assert not loaded, loaded
assert not any(name.startswith("sparsekern.kernels") for name in sys.modules)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_kernels_folder_gives_way_to_the_package_of_that_name(tmp_path):
    """It lies on the path of whatever runs from a clone, before what is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.17'\n")
    code = "import kernels, sparsekern.kernels.tables; assert kernels.__version__ == '0.17'"
    result = run(code, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert result.returncode == 0, result.stderr


def test_without_that_package_the_kernels_folder_is_empty_to_who_asks_for_it():
    code = """
import importlib
package = importlib.import_module("kernels")
assert getattr(package, "__file__", None) is None and not hasattr(package, "__version__")
try:
    from kernels import get_kernel
except ImportError:
    pass
else:
    raise SystemExit("it has one")
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_public_names_exist_and_are_documented():
    for name in sparsekern.__all__:
        assert getattr(sparsekern, name).__doc__, name


def test_every_error_class_is_public():
    raised = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and name[0] != "_"
    }
    assert raised <= set(sparsekern.__all__)
    for name in raised:
        assert getattr(sparsekern, name) is getattr(errors, name)
        assert issubclass(getattr(errors, name), sparsekern.SparseKernError)


def test_forks_are_watched_from_the_first_import_on():
    result = run(
        "import sparsekern, sys; assert 'sparsekern.ops.cpu.threads' in sys.modules; "
        "assert 'numba' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr
