"""Installs the packages and the command `dali-timesformer`. Lower bounds are the oldest versions tested."""

import runpy

from setuptools import find_packages, setup

VERSION = runpy.run_path("common/version.py")["VERSION"]

setup(
    name="dali-timesformer",
    version=VERSION,
    description="PP-TimeSformer in PyTorch, fed by NVIDIA DALI",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(exclude=["tests", "tests.*"]), "configs"],
    py_modules=["dali_timesformer"],
    package_data={"configs": ["*.yaml", "labels/*"], "evaluation": ["report.css", "report.js"], "*": ["py.typed"]},
    entry_points={"console_scripts": ["dali-timesformer = commands.__main__:main"]},
    install_requires=[
        "av>=18.1,<19",
        "numpy>=2.4",
        "nvidia-dali-cuda120>=2.4,<3",
        "nvidia-ml-py>=13.615",
        "omegaconf>=2.4",
        "pyyaml>=6",
        "safetensors>=0.8",
        "tensorboard>=2.21",
        "torch>=2.13,<3",
        "tqdm>=4.70",
    ],
    extras_require={
        "dask": ["distributed>=2026.8"],
        "export": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"],
        "hub": ["huggingface_hub>=2.4"],
        "mlflow": ["mlflow-skinny>=3.17"],
        "nvdec": ["torchcodec>=0.11,<0.14"],
        "pictures": ["matplotlib>=3.11"],
        "remote": ["aiohttp>=3.14", "fsspec>=2026.9"],
        "wandb": ["wandb>=0.31"],
        "test": [
            "aiohttp>=3.14",
            "distributed>=2026.8",
            "fsspec>=2026.9",
            "huggingface_hub>=2.4",
            "hypothesis>=6.100",
            "matplotlib>=3.11",
            "mlflow-skinny>=3.17",
            "mypy>=2.4",
            "onnx>=1.23",
            "onnxruntime>=1.32",
            "onnxscript>=0.7",
            "pdoc>=16",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "timm>=1.0.31",
            "torchcodec>=0.13,<0.14",
            "transformers>=5.23",
            "types-PyYAML>=6",
            "types-tqdm>=4.67",
            "wandb>=0.31",
            "webdataset>=1.0.2",
        ],
    },
)
