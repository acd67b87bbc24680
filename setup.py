"""Where the packages lie. In a wheel all are below the one import name `pacemark`; in a clone they stay side by side.

`harness`, `workloads`, `submissions` and `scripts` are names that other packages have too. The wheel puts them into
pacemark/_lib, which pacemark/__init__.py adds to the path, together with the files that the commands read.
"""

import sys

from setuptools import find_packages, setup

LIBRARIES = ["harness", "workloads", "submissions", "scripts"]
# The configs of every choice, and the packed records of the baselines, which `pacemark compare` looks into.
DATA = {
    "configs": ["**/*.yaml"],
    "results": ["external/**/*.tar.xz", "external/timing.csv", "untuned/**/*.tar.xz"],
    "harness.board.page": ["templates/*.html", "static/*"],
}

libraries = find_packages(include=[*LIBRARIES, *(f"{name}.*" for name in LIBRARIES)])
if "editable_wheel" in sys.argv:
    setup(packages=["pacemark", *libraries])
else:
    setup(
        packages=["pacemark", *(f"pacemark._lib.{package}" for package in [*libraries, "configs", "results"])],
        package_dir={f"pacemark._lib.{folder}": folder for folder in [*LIBRARIES, "configs", "results"]},
        package_data={f"pacemark._lib.{package}": patterns for package, patterns in DATA.items()},
    )
