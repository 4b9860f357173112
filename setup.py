"""Installs the packages and the commands' modules. The lower bounds are the oldest versions that have been tested."""

from setuptools import setup

setup(
    name="dali-timesformer",
    version="0.1.0",
    description="PP-TimeSformer in PyTorch, fed by NVIDIA DALI",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["benchmarks", "dali_pipelines", "model", "preparation", "training"],
    package_data={"training": ["report.css", "report.js"]},
    py_modules=["benchmark", "evaluate", "predict", "prepare", "train", "weights"],
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
        "hub": ["huggingface_hub>=2.4"],
        "pictures": ["matplotlib>=3.11"],
        "remote": ["aiohttp>=3.14", "fsspec>=2026.9"],
        "test": [
            "aiohttp>=3.14",
            "distributed>=2026.8",
            "fsspec>=2026.9",
            "huggingface_hub>=2.4",
            "hypothesis>=6.100",
            "matplotlib>=3.11",
            "pytest>=9.2",
            "ruff>=0.17",
            "timm>=1.0.31",
            "transformers>=5.23",
            "webdataset>=1.0.2",
        ],
    },
)
