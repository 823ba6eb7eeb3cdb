"""What is packed, and that what is packed works where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

from children import ROOT

pytestmark = pytest.mark.slow

CYTHON = ROOT / "cython_src"
#: Where the wheel has the modules, without the suffix of this interpreter's.
MODULES = {
    source.relative_to(CYTHON).with_suffix("").as_posix() for source in CYTHON.rglob("*.pyx")
}

USE = """
from vmm_linux import VMM, VmmFlags
with VMM() as vmm:
    va = vmm.allocate(0, 1 << 16, VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE)
    vmm.commit(va, 1 << 16)
    vmm.write(va, b"written")
    print(vmm.read(va, 7))
    vmm.free(va, 1 << 16)
"""


class Packages(NamedTuple):
    """The two distributions of this checkout."""

    sdist: Path
    wheel: Path


def run(*command: str | Path) -> str:
    """Run a command to its good end; the answer is its output."""
    outcome = subprocess.run(
        command,
        check=False,
        env={**os.environ, "CXXFLAGS": "-O0"},  # what is packed matters here, not how fast it is
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """A source distribution of this checkout, and the wheel built from it, each in isolation."""
    folder = tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return Packages(sdist, wheel)


def test_the_source_distribution_has_every_source_and_nothing_generated(packages: Packages) -> None:
    with tarfile.open(packages.sdist) as archive:
        packed = {
            PurePosixPath(*PurePosixPath(member.name).parts[1:])
            for member in archive
            if member.isfile()
        }
    sources = {
        PurePosixPath(path.relative_to(ROOT))
        for folder in (".ci", "cython_src", "docs", "scripts", "tests", "vmm_linux")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so"}
    }
    root = {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    made = {path for path in packed if path.parts[0] == "vmm_linux.egg-info"}
    made |= {PurePosixPath("PKG-INFO"), PurePosixPath("setup.cfg")}
    assert packed - made == sources | {PurePosixPath(name) for name in root}


def test_a_wheel_has_the_package_its_stubs_and_its_modules_and_nothing_else(
    packages: Packages,
) -> None:
    with zipfile.ZipFile(packages.wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read("vmm_linux-0.1.0.dist-info/METADATA").decode()
    kinds = {".html", ".py", ".pyi", ".service", ".socket", ".typed"}
    sources = {path for path in (ROOT / "vmm_linux").rglob("*") if path.suffix in kinds}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert packed == {
        *(path.relative_to(ROOT).as_posix() for path in sources),
        *(f"{module}{suffix}" for module in MODULES),
    }
    assert {"vmm_linux/py.typed", "vmm_linux/cli/map/page.html"} <= packed
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == []


def test_a_wheel_built_from_the_sdist_imports_and_works(packages: Packages, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "clean")
    python = tmp_path / "clean" / "bin" / "python"
    run(python, "-m", "pip", "install", packages.wheel)
    assert run(python, "-I", "-c", USE) == "b'written'\n"
    place = run(python, "-I", "-c", "import vmm_linux; print(vmm_linux.__file__)")
    assert Path(place.strip()).is_relative_to(tmp_path)
