"""Fixtures of several files on backbones."""

import pathlib

import pytest

from tests.backbones import janus_published


@pytest.fixture(scope="session")
def janus_gpt(parity, tmp_path_factory) -> pathlib.Path:
  """The folder of Janus-Pro's fixture, with files in both layouts."""
  folder = tmp_path_factory.mktemp("janus_gpt")
  return janus_published.write(parity / "janus_pro" / "gpt", folder)
