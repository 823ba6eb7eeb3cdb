"""Build of the Cython core: a module of ``vmm_linux/_core`` for each layer.

``cython_src/vmm_linux/_core/LAYER.pyx`` includes its parts from the folder ``LAYER``.

Everything generated goes to ``build/``. ``python setup.py build_ext --inplace`` builds what has
changed and nothing else: Cython compares the sources (``cimport``-ed ones too) and this file with
the C++ made from them, setuptools compares that with the modules.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# setuptools wants the paths of sources relative to this file.
os.chdir(Path(__file__).resolve().parent)

SOURCES = Path("cython_src")
#: ``VMM_LINUX_SANITIZE=address,undefined`` builds with those sanitizers of the compiler.
SANITIZERS = os.environ.get("VMM_LINUX_SANITIZE", "")
#: Each set of sanitizers has objects of its own, so that a change of the set is noticed.
BUILD = Path("build", SANITIZERS)

# How far to optimize is left to Python's own flags and to CXXFLAGS. Symbols and line numbers are
# for a build that looks for faults: they would more than double the modules.
compile_args = ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
if SANITIZERS:
    compile_args += ["-g1", f"-fsanitize={SANITIZERS}", "-fno-omit-frame-pointer"]
    link_args = [f"-fsanitize={SANITIZERS}"]
else:
    compile_args += ["-g0"]
    link_args = ["-Wl,--strip-all"]


def extension(source: Path) -> Extension:
    """The extension module that one ``.pyx`` file makes."""
    name = ".".join(source.relative_to(SOURCES).with_suffix("").parts)
    return Extension(
        name,
        [str(source)],
        include_dirs=[str(source.parent)],
        language="c++",
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


class BuildExtensions(build_ext):
    """``build_ext`` with Cython first: a source distribution needs nothing generated."""

    def finalize_options(self) -> None:
        """Let in-place builds and editable installs share their work."""
        if self.inplace or self.editable_mode:
            self.build_lib = str(BUILD / "inplace" / sys.implementation.cache_tag)
            self.build_temp = str(BUILD / "temp" / sys.implementation.cache_tag)
        super().finalize_options()

    def is_newer_than_generated(self) -> bool:
        """Whether this file, which has Cython's directives, changed since C++ was made."""
        made = [BUILD / Path(each.sources[0]).with_suffix(".cpp") for each in self.extensions]
        changed = Path("setup.py").stat().st_mtime
        return any(each.exists() and each.stat().st_mtime < changed for each in made)

    def build_extensions(self) -> None:
        """Make the C++ that has to be made, then the modules."""
        generated = cythonize(
            self.extensions,
            include_path=[str(SOURCES)],
            build_dir=str(BUILD),
            nthreads=os.cpu_count(),
            force=self.force or self.is_newer_than_generated(),
            compiler_directives={
                "language_level": 3,
                "boundscheck": False,
                "wraparound": False,
                "cdivision": True,
                # What can be copied or pickled is for each class to say: what Cython makes up
                # gives a second owner of one thing, and sets any attribute to anything.
                "auto_pickle": False,
                # Methods of a built-in type, which a call gets to without an object in between.
                "binding": False,
                "embedsignature": True,
                "embedsignature.format": "clinic",
            },
        )
        for module, made in zip(self.extensions, generated, strict=True):
            module.sources = made.sources
            module.depends = ["setup.py", *made.depends]
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=[extension(source) for source in sorted(SOURCES.glob("vmm_linux/_core/*.pyx"))],
    options={
        "build": {"build_base": str(BUILD)},
        "build_ext": {"parallel": os.cpu_count()},
    },
)
