"""fogsculpt: text-to-image diffusion on JAX."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "engine/__init__.py").read_text()).group(1)

train = [
    "optax>=0.2.8",  # optimizers and schedules
    "orbax-checkpoint>=0.11",  # checkpoints that survive a crash
    "tensorboardX>=2.6",  # curves for TensorBoard, without TensorFlow
    "matplotlib>=3.9",  # the plot of the loss
]

jobs = [
    "pyarrow>=18",  # prompt files and shards in Parquet
    "array_record>=0.7",  # shards in ArrayRecord
    "s3fs>=2025.2",  # s3:// as output folder
    "gcsfs>=2025.2",  # gs:// as output folder
]

quantize = [
    "qwix>=0.1.8",  # weights in 8 bits
]

setup(
    name="fogsculpt",
    version=VERSION,
    description="Text-to-image diffusion on JAX: a Flax U-Net mapped over every TPU or GPU",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["engine*", "configs*", "launch*"]),
    package_data={"engine": ["assets/**/*"]},
    install_requires=[
        "jax>=0.8",  # the array engine
        "flax>=0.12",  # NNX modules
        "numpy>=2.0",
        "pillow>=11.0",  # PNG, WebP, contact sheets
        "safetensors>=0.5",  # weights on disk, without pickle
        "tokenizers>=0.21",  # CLIP's BPE; 40 times quicker to import than transformers
        "absl-py>=2.1",  # flags
        "ml_collections>=1.0",  # --config files with typed overrides
        "jaxtyping>=0.3",  # shapes in signatures
        "tqdm>=4.66",  # progress bars
        "platformdirs>=4.0",  # where each system keeps caches
        "tenacity>=9.0",  # trying again, where a disk or a network fails for a while
        "scipy>=1.13",  # LAPACK's Cholesky with pivots, for FID; JAX needs it, too
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.8"],
        "cuda": [
            "jax[cuda13]>=0.8",
            "nvidia-ml-py>=12",  # launch.benchmark: the energy that GPUs count
        ],
        "quantize": quantize,
        "train": train,
        "jobs": jobs,
        "test": [
            *train,
            *jobs,
            *quantize,
            "moto[server]>=5.0.20",  # a real S3 server on this machine
            "gcp-storage-emulator>=2024.8.3",  # a Google Cloud Storage on this machine
            "webdataset>=1.0",  # reads the shards that we write
            "kubeflow-trainer-api>=2.3",  # the published schema of JobSet, as models
            "jsonschema>=4.23",  # jobset.yaml against it
            "pyyaml>=6.0",
            "pytest>=8",
            "pytest-xdist>=3.7",  # two files of tests at a time
            "beartype>=0.19",  # checks the jaxtyping annotations in the tests
            "ruff>=0.9",
            "torch==2.13.0",  # the originals that everything is held against
            "diffusers>=0.35",
            "transformers>=4.50",
            "peft>=0.17",  # LoRAs in PyTorch diffusers
            "tomesd>=0.1.3",  # merged tokens in PyTorch diffusers
            "torchsde>=0.2.6",  # diffusers' DPMSolverSDEScheduler
        ],
    },
)
