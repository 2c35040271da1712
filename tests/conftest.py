"""Turns the shape annotations of the whole package into checks."""

import os
import pathlib
import tempfile
from importlib.metadata import version

import pytest
from jaxtyping import install_import_hook

install_import_hook("tensorar_jax", "beartype.beartype")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Most of the time goes into compiling small programs that run once. Without
  # optimisation and with the plain code generator that takes 2/5 of the time.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  plain = "--xla_cpu_parallel_codegen_split_count=1"
  if version("jaxlib").startswith("0.10."):  # later ones know no other emitter
    plain += " --xla_cpu_use_fusion_emitters=false"
  if plain not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {plain}"
else:  # what is compared with float32 is not to be TF32 or bfloat16
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Many tests, and every command that they start, compile the same programs.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/tensorar_jax_tests"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
  """`-m parity` are the tests that read fixtures."""
  for item in items:
    if "parity" in item.fixturenames:
      item.add_marker("parity")


@pytest.fixture(scope="session")
def parity() -> pathlib.Path:
  """Outputs of the published models; TENSORAR_PARITY names another folder."""
  folder = pathlib.Path(os.environ.get("TENSORAR_PARITY", FIXTURES / "parity"))
  if not folder.is_dir():
    pytest.fail(f"no parity fixtures at {folder}: is the clone complete?")
  return folder


@pytest.fixture(scope="session")
def field() -> pathlib.Path:
  """Small files as users' tools write them, taken from bug reports."""
  return FIXTURES / "field"


@pytest.fixture
def optimised():
  """For tests about programs: they are compiled as a user's are."""
  import jax

  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)
