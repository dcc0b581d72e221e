"""`lavit assemble`: the parts of two checkpoints in one."""

from pathlib import Path

from safetensors.torch import load_file

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration

STEPS = ["--steps", 2, "--seed", 0]


def test_assemble(lavit, random_checkpoint: Path, tmp_path: Path) -> None:
    language_model = tmp_path / "lm"
    LavitForConditionalGeneration.from_pretrained(random_checkpoint).save_pretrained(language_model)
    ImageTextProcessor.from_pretrained(random_checkpoint).save_pretrained(language_model)
    joined = tmp_path / "joined"
    result = lavit("assemble", language_model, random_checkpoint, joined)
    assert result.exit_code == 0, result.output
    assert result.stdout == f'Wrote {joined}. Try it: lavit draw "a cat" --model {joined} -o cat.png\n'
    drawings = []
    for model in (random_checkpoint, joined):
        path = tmp_path / f"{model.name}.png"
        assert lavit("draw", "a cat", "-m", model, "-o", path, *STEPS).exit_code == 0
        drawings.append(path.read_bytes())
    assert drawings[0] == drawings[1]
    assert load_file(joined / "model.safetensors").keys() == load_file(language_model / "model.safetensors").keys()
    result = lavit("assemble", language_model, "lavit-emoji-small", tmp_path / "mixed")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "does not fit: codes: 2048 there, 64 in" in result.stderr and not (tmp_path / "mixed").exists()
    result = lavit("assemble", random_checkpoint, language_model, tmp_path / "mixed")
    assert "holds a 'lavit' model and no pixel decoder" in result.stderr
