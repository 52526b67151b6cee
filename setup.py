"""Builds the packages; everything that needs no code is in pyproject.toml."""

from setuptools import setup

setup()
