"""The files of code that travel with a pixel decoder."""

import subprocess
import sys

import pytest

from lavit_hf.pipelines import remote_code


@pytest.mark.parametrize("make", [remote_code.pipeline_code, remote_code.token_decoder_code])
def test_code_stands_alone(make, tmp_path):
    code = make()
    assert "from ." not in code and "\nimport lavit_hf" not in code and "from lavit_hf" not in code.split('"""')[-1]
    (tmp_path / "alone.py").write_text(code)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path / "alone.py")]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_only_what_is_needed_is_taken():
    code = remote_code.token_decoder_code()
    assert "class LavitCrossAttention" in code and "class LavitTokenDecoderConfig" in code
    assert "class LavitMerger" not in code and "class LavitConfig" not in code


def test_converted_directories_hold_it(checkpoint):
    for root in (checkpoint, checkpoint / "lowres"):
        assert (root / f"{remote_code.PIPELINE_MODULE}.py").read_text() == remote_code.pipeline_code()
        decoder = root / "token_decoder" / f"{remote_code.TOKEN_DECODER_MODULE}.py"
        assert decoder.read_text() == remote_code.token_decoder_code()


def test_package_imports_no_diffusers():
    code = "import sys, lavit_hf.pipelines, lavit_hf.pipelines.remote_code; print('diffusers' in sys.modules)"
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
