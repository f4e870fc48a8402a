"""The built distribution: what it carries, and what importing it costs."""

import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints, run without the caller's import path; fail with its errors."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


def repository_conf() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}


def test_the_wheel_carries_the_package_its_types_and_every_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lightning_peft").rglob("*.py")}

    assert {f"lightning_peft/{name}" for name in repository_conf()} <= names
    assert modules | {"lightning_peft/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_peft"}


def imported_packages() -> set[str]:
    """The top-level names that the package imports, late imports and those for types included."""
    names: set[str] = set()
    for path in (ROOT / "lightning_peft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"lightning_peft"}


def test_what_is_imported_is_declared(wheel: Path) -> None:
    metadata = PathDistribution(zipfile.Path(wheel, f"{wheel.stem.rsplit('-', 3)[0]}.dist-info/"))
    declared = {re.split(r"[^\w.-]", name)[0].lower() for name in metadata.requires or ()}
    distributions = packages_distributions()

    undeclared = {
        name
        for name in imported_packages()
        if not declared & {f.lower().replace("_", "-") for f in distributions.get(name, [name])}
    }

    assert not undeclared


def test_the_sdist_can_be_tested(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert repository_conf() <= names
    assert {"LICENSE", "Makefile", "constraints.txt", "tests/test_packaging.py"} <= names
    assert not any(name.startswith((".venv", "runs", "wandb")) for name in names)


def test_the_metadata_is_valid(dist: Path) -> None:
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)

    assert checked.count("PASSED") == 2


def test_an_installed_wheel_finds_its_own_configs_and_version(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    run(sys.executable, *pip, wheel, cwd=tmp_path)

    probe = """
import json, sys
sys.path.insert(0, sys.argv[1])
from importlib.metadata import version
import lightning_peft
from lightning_peft.jobs.conf import own_folder
print(json.dumps([lightning_peft.__file__, str(own_folder()), lightning_peft.__version__,
                  version("lightning-peft")]))
"""
    module, conf, declared, installed = json.loads(
        run(sys.executable, "-c", probe, target, cwd=tmp_path)
    )

    assert Path(module).is_relative_to(target)
    assert Path(conf) == target / "lightning_peft" / "conf"
    assert (Path(conf) / "train.yaml").is_file()
    assert declared == installed == wheel.name.split("-")[1]


def test_importing_the_package_is_cheap(tmp_path: Path) -> None:
    probe = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import lightning_peft
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    loaded = set(json.loads(run(sys.executable, "-c", probe, cwd=tmp_path)))

    assert "lightning_peft" in loaded
    assert not loaded & {"torch", "lightning", "transformers", "numpy", "hydra", "wandb"}
