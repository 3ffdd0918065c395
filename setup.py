"""The place where the optional C++/CUDA extension of csrc/ is declared; everything else stands in pyproject.toml.

The package installs and trains without an extension and without a compiler: a missing extension costs speed only.
"""

from setuptools import setup

setup()
