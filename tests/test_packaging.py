"""The wheel holds exactly the package, and runs where only torch is installed."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def sources():
    for folder in ("sparsekern", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] != ("sparsekern", "kernels"):
                yield relative


def test_listed_packages_are_those_of_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for path in sources():
        parts = path.parent.parts
        found.add(".".join(("sparsekern", *parts) if parts[0] == "kernels" else parts))
    assert sorted(listed) == sorted(found)


def test_symlink_serves_tools():
    assert (ROOT / "sparsekern" / "kernels").resolve() == ROOT / "kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]  # sdist, then wheel from it
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_tree_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = {n for n in names if ".dist-info/" not in n}
    expected = {
        ("sparsekern/" if p.parts[0] == "kernels" else "") + p.as_posix() for p in sources()
    }
    tables = {f"sparsekern/kernels/tables/{arch}.json" for arch in ("sm80", "sm90", "sm100")}
    assert code == expected | tables | {"sparsekern/py.typed"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(pip, check=True, capture_output=True, env=env)
    # torch and numpy are borrowed from this environment; the package is not
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    site = Path(sys.modules["torch"].__file__).parent.parent if "torch" in sys.modules else None
    assert site is not None
    for entry in site.iterdir():
        if "sparsekern" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    code = """
import importlib.util, torch, sparsekern
from sparsekern.kernels import launch
assert "/env/" in sparsekern.__file__, sparsekern.__file__
assert importlib.util.find_spec("kernels") is None
print(sparsekern.SparseLinear(8, 8)(torch.ones(2, 8)).shape)
import sparsekern.models
print(sparsekern.models.lenet_300_100()(torch.ones(2, 1, 28, 28)).shape)
"""
    env["PYTHONPATH"] = str(borrowed)
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    script = tmp_path / "env" / "bin" / "sparsekern"
    result = subprocess.run(
        [script, "train", "--method", "rigle"], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "rigle" in result.stderr


def test_triton_comes_along_on_linux_and_numba_by_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "triton>=3.6; platform_system == 'Linux'" in project["dependencies"]
    assert not any("numba" in needed for needed in project["dependencies"])
    assert any("numba" in needed for needed in project["optional-dependencies"]["cpu"])
    assert "triton" in project["optional-dependencies"]  # the name of old goes on working
