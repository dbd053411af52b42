"""Compiles the shim into the wheel: what pyproject.toml cannot say."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

SOURCE = "cni/shim/extbridge.c"
TARGET = "extbridge/shim/extbridge"

FLAGS = [
    "-std=c11",
    "-Os",
    # It runs on hosts and in containers whose libraries are not ours.
    "-static",
    "-s",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Wconversion",
    "-Wshadow",
    "-Wformat=2",
    "-Wcast-qual",
    "-Wstrict-prototypes",
    "-Werror",
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
]


def compiler() -> list[str]:
    """CC, else musl's gcc where there is one, else gcc.

    In a virtual machine a static glibc spends half of the shim's whole time on asking what CPU it
    runs on: each CPUID instruction is a call to the hypervisor (sysdeps/x86/cpu-features.c).
    """
    given = os.environ.get("CC") or ("musl-gcc" if shutil.which("musl-gcc") else "gcc")
    return shlex.split(given)


class BuildShim(Command):
    """A sub-command of `build`, as setuptools.command.build.SubCommand describes them."""

    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = Path("cni" if self.editable_mode else str(self.build_lib), TARGET)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*compiler(), *FLAGS, "-o", target, SOURCE], check=True)

    def get_source_files(self) -> list[str]:
        return [SOURCE]

    def get_outputs(self) -> list[str]:
        return [f"{self.build_lib}/{TARGET}"]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BinaryDistribution(Distribution):
    """Not for every platform, as one without extension modules would be."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """For every Python of the platform: the shim knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


build.sub_commands.append(("build_shim", None))
setup(
    distclass=BinaryDistribution,
    cmdclass={"build_shim": BuildShim, "bdist_wheel": PlatformWheel},
)
