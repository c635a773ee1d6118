"""Two packages from two roots: `ttpa`, and `ttpa_kernels`, which lies in `kernels/` (see docs/design.md)."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ttpa", "ttpa.*"]), *find_packages("kernels")],
    package_dir={"ttpa": "ttpa", "ttpa_kernels": "kernels/ttpa_kernels"},
    package_data={
        "ttpa": ["py.typed"],
        "ttpa.training": ["rates.json"],
        "ttpa.viewer": ["page/*"],
        "ttpa.embedded": ["*.jinja", "model/*"],
        "ttpa_kernels": ["py.typed"],
    },
)
