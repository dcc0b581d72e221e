import pytest
import torch

from lavit_hf import ImageTextProcessor, LavitForConditionalGeneration
from lavit_hf.training.language_model.data_collator import (
    LavitDataCollator,
    Segment,
    TrainingRow,
    pack_rows,
    pad_rows,
)
from tiny_parts import CHECKPOINT

LENGTHS = [5, 3, 9, 2, 7]


def rows(lengths=LENGTHS) -> list[TrainingRow]:
    result = []
    for index, length in enumerate(lengths):
        ids = [10 * (index + 1) + position for position in range(length)]
        result.append(TrainingRow(index, [Segment(ids=ids, is_learned=[True] * length)]))
    return result


def samples(count: int = 6) -> list[dict]:
    return [
        {"codes": [list(range(index, 3 * index + 2))], "text": "cat " * (index % 3 + 1), "sample_id": index}
        for index in range(count)
    ]


def test_everything_in_one_sequence():
    batch = pack_rows(rows(), pad_token_id=2)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(LENGTHS))
    lengths = sorted(LENGTHS, reverse=True)
    assert batch["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all(), "the row before does not predict the first id of a row"
    assert torch.equal(batch["labels"][~starts], batch["input_ids"][~starts])
    assert batch["use_cache"] is False, "transformers looks for packed rows only without a cache"


def test_no_sequence_is_longer_than_allowed():
    batch = pack_rows(rows(), pad_token_id=2, max_length=10)
    assert batch["position_ids"].tolist() == [[*range(9)], [*range(7), *range(2)], [*range(5), *range(3), 0]]
    assert batch["input_ids"][2, -1] == 2 and batch["labels"][2, -1] == -100, "the filling is a row of its own"
    filled = batch["input_ids"][batch["input_ids"] != 2]
    assert sorted(filled.tolist()) == sorted(index for row in rows() for index in row.ids), "no id is lost"


def test_sequences_are_about_equally_long():
    """Three full sequences and a fourth of one row would be mostly padding."""
    batch = pack_rows(rows([10] * 31), pad_token_id=2, max_length=100)
    assert batch["input_ids"].shape == (4, 80)


def test_a_row_longer_than_a_sequence():
    with pytest.raises(ValueError, match="row of 9 ids does not fit into sequences of 8"):
        pack_rows(rows(), 2, max_length=8)


def test_lengths_can_be_rounded_up():
    assert pack_rows(rows(), 2, multiple=8)["input_ids"].shape == (1, 32)
    assert pad_rows(rows(), 2, multiple=8)["input_ids"].shape == (5, 16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_length", [None, 40])
def test_packed_rows_do_not_see_one_another(attention, max_length):
    """Same loss and same gradients as with padding."""
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT, attn_implementation=attention)
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    results = []
    for packing in (False, True):
        batch = LavitDataCollator(processor, packing=packing, max_length=max_length)(samples())
        assert batch["input_ids"].shape[0] == (6 if not packing else 1 if max_length is None else 3)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad, model.get_input_embeddings().weight.grad))
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-5)


def test_a_packed_row_has_the_logits_it_has_alone():
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    collator = LavitDataCollator(ImageTextProcessor.from_pretrained(CHECKPOINT), packing=True)
    with torch.no_grad():
        packed = model(**collator(samples())).logits[0]
        alone = [model(**collator([sample])).logits[0] for sample in samples()]
    alone.sort(key=len, reverse=True)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_packing_shrinks_the_batch():
    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    padded, packed = (LavitDataCollator(processor, packing=packing)(samples()) for packing in (False, True))
    assert packed["input_ids"].numel() == padded["attention_mask"].sum() < padded["input_ids"].numel()


def test_features_cannot_be_packed():
    from PIL import Image

    processor = ImageTextProcessor.from_pretrained(CHECKPOINT)
    image = Image.new("RGB", (8, 8))
    collator = LavitDataCollator(processor, packing=True, image_first_probability=1)
    with pytest.raises(ValueError, match="Sample 9 has an image that enters as features.*image_first_probability=0"):
        collator([{"image": image, "text": "a", "sample_id": 9}])
