"""Importing the library imports nothing that takes seconds and may not be needed."""

import subprocess
import sys

SLOW = ["shap", "sympy", "pandas", "tqdm", "torch._dynamo", "matplotlib"]
CODE = f"""
import sys, torch
before = set(sys.modules)
import fxshap
print([name for name in {SLOW} if name in set(sys.modules) - before])
"""


def test_the_import_leaves_slow_packages_out():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
