"""Where the packages lie. Everything else about the distribution is in pyproject.toml.

`kernels/` and `examples/` are folders of the repository, not packages: Python run from the
repository root would otherwise take `kernels` for the Hugging Face package of that name. What they
hold is mapped onto import names here, which wheels, source distributions and editable installs all
follow.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["peftfast", "peftfast.*"]),
        *find_packages("kernels"),
        "peftfast_data",
    ],
    package_dir={
        "peftfast_kernels": "kernels/peftfast_kernels",
        "peftfast_data": "examples/data",
    },
    package_data={
        "peftfast": ["py.typed"],
        "peftfast_data": ["*/*"],
    },
)
