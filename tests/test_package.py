"""What `pip install .` brings: every file that the packages read is among their data."""

from __future__ import annotations

import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent.parent


def test_every_file_beside_the_code_is_installed(monkeypatch):
    given: dict = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path("setup.py")
    installed = set()
    for package, patterns in given["package_data"].items():
        top, *below = package.split(".")
        folder = ROOT.joinpath(given["package_dir"][top], *below)
        assert package in given["packages"] and folder.is_dir()
        for pattern in patterns:
            found = set(folder.glob(pattern))
            assert found, f"{package}: {pattern} is no file"
            installed |= found
    roots = [ROOT / path for path in given["package_dir"].values()]
    files = {file for root in roots for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in files - installed if file.suffix not in (".py", ".md")} == set()
