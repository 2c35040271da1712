"""Turns the shape annotations of the whole package into checks."""

import os
import pathlib
import tempfile

import pytest
from jaxtyping import install_import_hook

install_import_hook("tensorar_jax", "beartype.beartype")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests, and every command that they start, compile the same programs.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/tensorar_jax_tests"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

PARITY = pathlib.Path(
  os.environ.get(
    "TENSORAR_PARITY",
    pathlib.Path(__file__).parents[1].parent / "shared" / "parity",
  )
)


@pytest.fixture(scope="session")
def parity() -> pathlib.Path:
  """The folder of fixtures; absent, tests skip, but never under CI."""
  if not PARITY.is_dir():
    message = f"no parity fixtures at {PARITY}; set TENSORAR_PARITY"
    if os.environ.get("CI"):
      pytest.fail(message)
    pytest.skip(message)
  return PARITY
