"""The pipelines of the package, where diffusers is installed and where it is not."""

import subprocess
import sys

import pytest


def test_package_imports_no_diffusers():
    code = "import sys, lavit_hf.pipelines, lavit_hf.remote_code; print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_missing_diffusers_is_said(monkeypatch):
    import lavit_hf.pipelines

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lavit-hf\[pixels\]"):
        lavit_hf.pipelines.__getattr__("LavitPixelDecoderPipeline")
    with pytest.raises(AttributeError):
        lavit_hf.pipelines.__getattr__("Nothing")
    assert "LavitPixelDecoderPipeline" in dir(lavit_hf.pipelines)
