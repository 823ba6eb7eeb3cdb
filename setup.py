"""Build of the Cython core: ``cython_src/vmm_linux/*.pyx`` become ``vmm_linux/*.so``.

Everything generated goes to ``build/``. ``python setup.py build_ext --inplace`` builds what has
changed and nothing else: Cython compares the sources (``cimport``-ed ones too) with the C++ made
from them, setuptools compares that with the modules.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# Extension sources have to be relative paths.
os.chdir(Path(__file__).resolve().parent)

SOURCES = Path("cython_src")
#: ``VMM_LINUX_SANITIZE=address,undefined`` builds with those sanitizers of the compiler.
SANITIZERS = os.environ.get("VMM_LINUX_SANITIZE", "")
#: Each set of sanitizers has objects of its own, so that a change of the set is noticed.
BUILD = Path("build", SANITIZERS)

compile_args = ["-O2", "-g", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
link_args = []
if SANITIZERS:
    compile_args += [f"-fsanitize={SANITIZERS}", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={SANITIZERS}"]


def extension(source: Path) -> Extension:
    """The extension module that one ``.pyx`` file makes."""
    name = ".".join(source.relative_to(SOURCES).with_suffix("").parts)
    return Extension(
        name,
        [str(source)],
        language="c++",
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(
    ext_modules=cythonize(
        [extension(source) for source in sorted(SOURCES.glob("vmm_linux/*.pyx"))],
        include_path=[str(SOURCES)],
        build_dir=str(BUILD),
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": True,
            "embedsignature.format": "python",
        },
    ),
    options={
        "build": {"build_base": str(BUILD)},
        "build_ext": {"parallel": os.cpu_count()},
    },
)
